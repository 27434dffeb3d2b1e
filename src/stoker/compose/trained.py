"""Which weights of a run train, at which rates, and the noise that training may add to what the embedding gives."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from stoker.arch import families
from stoker.arch.spec import ArchSpec
from stoker.config.schema import Train
from stoker.errors import ConfigError
from stoker.optim.groups import is_embedding, is_head

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stoker.models.open import Model, Spec

_SHOWN = 3


def keep_only(decoder: "Model", spec: "Spec", patterns: Sequence[str]) -> int:
    """Freezes every weight whose Hugging Face names none of `patterns` matches; returns how many numbers train.

    A pattern matches from a name's start. Several weights of a file may be one parameter here, as q, k and v are: it
    trains only if all of its names match.

    Raises:
        ConfigError: a pattern matches nothing, or some but not all names of a parameter.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    names = _file_names(decoder, spec)
    unused = [
        one.pattern for one in compiled if not any(one.match(name) for theirs in names.values() for name in theirs)
    ]
    if unused:
        some = ", ".join(next(iter(names.values()))[:1] + names[list(names)[-1]][:1])
        raise ConfigError(f"train.only: {unused[0]!r} matches no weight.", fix=f"Names are such as {some}.")
    for ours, parameter in decoder.named_parameters():
        theirs = names[ours]
        matched = [name for name in theirs if any(one.match(name) for one in compiled)]
        if matched and len(matched) < len(theirs):
            missing = next(name for name in theirs if name not in matched)
            raise ConfigError(
                f"train.only matches {matched[0]} but not {missing}; they are one weight here.",
                fix="Match all of them, or none.",
            )
        parameter.requires_grad_(bool(matched))
    return sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)


def _file_names(decoder: "Model", spec: "Spec") -> dict[str, tuple[str, ...]]:
    """Returns the names in the model's files of each parameter."""
    if isinstance(spec, ArchSpec):
        known = {entry.ours: entry.theirs for entry in families.weight_map(spec)}
        return {name: known[name] for name, _ in decoder.named_parameters()}
    from stoker.models.borrowed.load import parameter_names

    return parameter_names(cast("Any", decoder))


def rate_scale(train: Train) -> Callable[[str], float] | None:
    """Returns the multiple of the learning rate for a parameter's name; None where all have the same rate."""
    embedding = None
    if train.embedding_learning_rate is not None:
        embedding = train.embedding_learning_rate / train.learning_rate
    if embedding is None and train.lora_plus_ratio is None:
        return None

    def scale(name: str) -> float:
        if embedding is not None and (is_embedding(name) or is_head(name)):
            return embedding
        is_b = name.endswith("lora_b") or "lora_b." in name
        return train.lora_plus_ratio if train.lora_plus_ratio is not None and is_b else 1.0

    return scale


@contextmanager
def embedding_noise(decoder: "Model", alpha: float | None) -> Iterator[None]:
    """Adds noise to what the embedding gives while the model trains, in the width of a row: NEFTune (arXiv:2310.05914).

    Each number gets a draw from the uniform distribution between -m and m, m = alpha / sqrt(T * D), for outputs
    `[B, T, D]`. None adds none.
    """
    if alpha is None:
        yield
        return

    def add(module: "nn.Module", inputs: "tuple[Tensor, ...]", output: "Tensor") -> "Tensor":
        import torch

        if not module.training:
            return output
        exchange = getattr(decoder, "exchange", None)  # with one, the output is a part of rows
        length = output.shape[-2] * (1 if exchange is None else exchange.size)
        bound = alpha / (length * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-bound, bound)

    handle = _embedding(decoder).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _embedding(decoder: "Model") -> "nn.Module":
    from stoker.nn.decoder import Decoder

    return decoder.embedding if isinstance(decoder, Decoder) else cast("Any", decoder.model).get_input_embeddings()
