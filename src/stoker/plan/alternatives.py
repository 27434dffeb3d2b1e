"""What a user could change so that a run fits, from the least to the most far-reaching."""

from collections.abc import Iterator
from typing import Any

from stoker.config.schema import Adafactor, Adapter, Engine, RunConfig

_SHORTEST = 1024


def alternatives(config: RunConfig, row_tokens: int, *, has_bf16: bool = False) -> Iterator[tuple[str, RunConfig, int]]:
    """Yields advice, the configuration that follows it and its tokens of a row; each includes those before it.

    `has_bf16`: the device computes in bf16.
    """
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
    if has_bf16 and _may_be_bf16(config):
        train = config.train.model_copy(update={"weight_dtype": "bf16"})
        config = config.model_copy(update={"train": train})
        yield "train.weight_dtype: bf16", config, row_tokens
        yield from _shorter(config, row_tokens, beside="train.weight_dtype: bf16 and ")
    else:
        yield from _shorter(config, row_tokens)
    if config.adapter is None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"weight_dtype": "fp32"})})
        yield "an adapter (adapter: {kind: lora})", config.model_copy(update={"adapter": Adapter()}), row_tokens
        train = config.train.model_copy(update={"optimizer": Adafactor()})
        yield "train.optimizer: {kind: adafactor}", config.model_copy(update={"train": train}), row_tokens


def _may_be_bf16(config: RunConfig) -> bool:
    """Whether trained weights are fp32 and all else allows them to be bf16."""
    train = config.train
    is_plain = train.weight_dtype == "fp32" and train.optimizer.kind == "adamw"
    return config.adapter is None and is_plain and config.engine.precision in ("auto", "bf16")


def _shorter(config: RunConfig, row_tokens: int, *, beside: str = "") -> Iterator[tuple[str, RunConfig, int]]:
    tokens = row_tokens
    while tokens > _SHORTEST:
        tokens //= 2
        yield f"{beside}data.sequence_length: {tokens}", config, tokens


def _with_engine(config: RunConfig, **changes: Any) -> RunConfig:
    engine: Engine = config.engine.model_copy(update=changes)
    return config.model_copy(update={"engine": engine})
