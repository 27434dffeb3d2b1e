"""What a user could change so that a run fits, from the least to the most far-reaching."""

from collections.abc import Iterator
from typing import Any

from stoker.config.schema import Adafactor, Adapter, Engine, RunConfig

_SHORTEST = 1024


def alternatives(config: RunConfig, row_tokens: int) -> Iterator[tuple[str, RunConfig, int]]:
    """Yields advice, the configuration that follows it and its tokens of a row; each includes those before it."""
    for name, value in (("micro_batch_size", "auto"), ("recompute", "auto"), ("offload_activations", "auto")):
        if getattr(config.engine, name) != value:
            config = _with_engine(config, **{name: value})
            yield f"engine.{name}: auto", config, row_tokens
    if config.engine.memory_limit_gib is not None:
        config = _with_engine(config, memory_limit_gib=None)
        yield "engine.memory_limit_gib: null", config, row_tokens
    if config.adapter is not None and config.model.quantization == "none":
        small = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "nf4"})})
        yield "model.quantization: nf4", small, row_tokens
        yield from _shorter(small, row_tokens, beside="model.quantization: nf4 and ")
    yield from _shorter(config, row_tokens)
    if config.adapter is None:
        yield "an adapter (adapter: {kind: lora})", config.model_copy(update={"adapter": Adapter()}), row_tokens
        train = config.train.model_copy(update={"optimizer": Adafactor()})
        yield "train.optimizer: {kind: adafactor}", config.model_copy(update={"train": train}), row_tokens


def _shorter(config: RunConfig, row_tokens: int, *, beside: str = "") -> Iterator[tuple[str, RunConfig, int]]:
    tokens = row_tokens
    while tokens > _SHORTEST:
        tokens //= 2
        yield f"{beside}data.sequence_length: {tokens}", config, tokens


def _with_engine(config: RunConfig, **changes: Any) -> RunConfig:
    engine: Engine = config.engine.model_copy(update=changes)
    return config.model_copy(update={"engine": engine})
