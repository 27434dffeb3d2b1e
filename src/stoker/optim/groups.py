"""Sorts parameters by how they are trained: which decay towards zero, and which are hidden matrices."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Parameter

NamedParameters = Iterable[tuple[str, Parameter]]

_EMBEDDINGS = ("embedding", "embeddings", "embed", "wte", "wpe", "word_embeddings", "tokens_embed", "positions_embed")
_HEADS = ("head", "lm_head", "embed_out", "score")
# Decay rates, skips and step sizes of state spaces: near zero they mean something else, so none is pulled there (the
# authors of Mamba mark them so). By their last name alone: Hugging Face's and ours are the same.
_STATE_SPACE = ("A_log", "D", "dt_bias")


def is_embedding(name: str) -> bool:
    """Whether `name` (dotted) belongs to an embedding: the model's own or a borrowed Transformers model's."""
    return any(part in _EMBEDDINGS or part.startswith("embed_") for part in name.split(".")) and not is_head(name)


def is_head(name: str) -> bool:
    """Whether `name` (dotted) belongs to the output head."""
    return any(part in _HEADS for part in name.split("."))


def is_of_state_space(name: str) -> bool:
    """Whether `name` (dotted) is a state space's own parameter, not a layer's weight."""
    return name.rpartition(".")[2] in _STATE_SPACE


def decays(name: str, parameter: Parameter) -> bool:
    """Whether weight decay acts on the parameter: on matrices, not on norms, biases, magnitudes, embeddings and the
    parameters of state spaces."""
    return parameter.ndim >= 2 and not is_embedding(name) and not is_of_state_space(name)


def is_hidden_matrix(name: str, parameter: Parameter) -> bool:
    """Whether the parameter is a matrix between hidden states, which is what Muon is made for."""
    is_hidden = not is_embedding(name) and not is_head(name) and not is_of_state_space(name)
    return parameter.ndim == 2 and is_hidden


RateScale = Callable[[str], float]
"""From a parameter's name to the multiple of the learning rate that it is trained at."""


def by_decay(
    named_parameters: NamedParameters,
    *,
    weight_decay: float,
    decay_all: bool,
    rate_scale: RateScale | None = None,
) -> list[dict[str, Any]]:
    """Returns optimiser groups: those that decay, then those that do not, each by `rate_scale`; none is empty."""
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in named_parameters:
        decay = weight_decay if decay_all or decays(name, parameter) else 0.0
        groups.setdefault((decay, 1.0 if rate_scale is None else rate_scale(name)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, **({} if scale == 1.0 else {"rate_scale": scale})}
        for (decay, scale), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]
