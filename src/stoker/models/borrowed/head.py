"""The output layer of a borrowed model: kept out of the forward, so that a loss can run it in chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Logits that the probe reaches: far beyond what a soft-cap leaves alone.
_PROBE_LOGITS = 100.0
_ROWS_AT_ONCE = 8192
# Of the largest logit; the probe's arithmetic is fp32.
_TOLERANCE = 1e-4


class HeadTap(nn.Module):
    """The model's output layer, with the same parameters, that hands on the hidden states instead of logits.

    What the class does to logits afterwards (scale, soft-cap, cast) then happens to the hidden states, and is thrown
    away. With `computes` it is an ordinary linear layer, and with a `gain` one whose output is multiplied, in fp32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.computes = False
        self.gain: float | None = None
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to the same, or to logits [..., V]; `seen` is the input."""
        self.seen = hidden
        if self.gain is not None:
            return self.gain * self.logits(hidden)
        return nn.functional.linear(hidden, self.weight, self.bias) if self.computes else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The plain linear layer, in fp32; a piece of the weight at a time, which whole would be a large copy."""
        pieces = [hidden.float() @ rows.float().T for rows in self.weight.split(_ROWS_AT_ONCE)]
        scores = torch.cat(pieces, dim=-1)
        return scores if self.bias is None else scores + self.bias.float()


@dataclass(frozen=True)
class HeadFit:
    """How the class makes logits z of the linear layer's output y: z = s y, or z = c tanh(y / c)."""

    scale: float = 1.0
    softcap: float | None = None


def fit(tap: HeadTap, run: Callable[[], Tensor], config: Any) -> HeadFit | None:
    """Returns what the class does to the linear layer's output, or None when it is neither of the known ways.

    `run` returns the class's own logits on a probe. They are looked at up to 100, where a soft-cap shows.
    """
    tap.gain = 1.0
    run()
    assert tap.seen is not None
    largest = tap.logits(tap.seen).abs().max().item()
    try:
        tap.gain = _PROBE_LOGITS / max(largest, 1e-6)
        made = run().float()
        plain = tap.gain * tap.logits(tap.seen)
    finally:
        tap.gain = None
    if made.shape != plain.shape:
        return None
    for cap in _caps(config):
        if _is_close(made, cap * torch.tanh(plain / cap)):
            return HeadFit(softcap=cap)
    scale = ((made * plain).sum() / plain.square().sum()).item()
    scale = 1.0 if abs(scale - 1.0) < _TOLERANCE else scale
    return HeadFit(scale) if _is_close(made, scale * plain) else None


def _is_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())


def _caps(config: Any) -> list[float]:
    """The numbers of a configuration that may be a soft-cap of the logits."""
    values = config.get_text_config().to_dict().items()
    keys = ("softcap", "soft_cap", "logit_cap", "logits_cap")
    return [float(v) for k, v in values if any(key in k for key in keys) and isinstance(v, int | float) and v > 0]
