"""Builds optimisers: chooses the class, groups and options."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from stoker.optim.adafactor import Adafactor
from stoker.optim.base import OwnOptimizer, Update
from stoker.optim.eight_bit import EightBit, EightBitAdamW
from stoker.optim.flat import FlatAdamW
from stoker.optim.groups import NamedParameters, RateScale, by_decay, is_hidden_matrix
from stoker.optim.stochastic import StochasticAdamW

KINDS = ("adamw", "adamw_8bit", "sgd", "adafactor", "muon")

# Where torch has a fused AdamW kernel: one pass over the weights instead of about ten.
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


def build(
    named_parameters: NamedParameters,
    *,
    kind: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    decay_all: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    momentum: float | None = None,
    rate_scale: RateScale | None = None,
    rounded_update: Update | None = None,
    flat: bool = False,
    flat_update: Update | None = None,
    eight_bit: EightBit | None = None,
) -> torch.optim.Optimizer:
    """Returns the optimiser `kind` over those of `named_parameters` that require a gradient.

    `weight_decay` acts on matrices only, unless `decay_all`: norms, biases and embeddings are left alone. `betas` and
    `epsilon` are AdamW's (and of Muon's AdamW part); `momentum` is SGD's (0 unless set) and Muon's (0.95 unless set).
    `rate_scale` gives parameters, by name, a multiple of the rate, which the strategy applies at each step.
    `rounded_update` makes AdamW a `StochasticAdamW`, which bf16 weights need; `flat` makes it a `FlatAdamW`, with
    `flat_update` as its step if given. `eight_bit`: how the averages of adamw_8bit are kept, which it must be told.

    Raises:
        ValueError: the kind is unknown, no parameter is trained, a bf16 one would be rounded to the nearest, or
            something that the kind needs is missing.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient")
    if rounded_update is not None and kind != "adamw":
        raise ValueError(f"only adamw rounds stochastically, not {kind}")
    if flat and (kind != "adamw" or rounded_update is not None):
        raise ValueError(f"only adamw on fp32 weights steps all at once, not {kind}")
    if rounded_update is None and any(parameter.dtype == torch.bfloat16 for _, parameter in trained):
        raise ValueError("bf16 weights lose small updates unless they are rounded stochastically: rounded_update")
    options: dict[str, Any] = {"lr": learning_rate, "betas": tuple(betas), "eps": epsilon}

    def groups(named: NamedParameters) -> list[dict[str, Any]]:
        return by_decay(named, weight_decay=weight_decay, decay_all=decay_all, rate_scale=rate_scale)

    def adamw(named: Sequence[tuple[str, Parameter]]) -> torch.optim.Optimizer:
        if rounded_update is not None:
            return StochasticAdamW(groups(named), update=rounded_update, **options)
        if flat:
            return FlatAdamW(groups(named), update=flat_update, **options)
        return torch.optim.AdamW(groups(named), fused=_can_fuse(named), **options)

    match kind:
        case "adamw":
            return adamw(trained)
        case "adamw_8bit":
            if eight_bit is None:
                raise ValueError("adamw_8bit needs to be told how its averages are kept: eight_bit")
            return EightBitAdamW(groups(trained), kept=eight_bit, **options)
        case "sgd":
            return torch.optim.SGD(groups(trained), lr=learning_rate, momentum=momentum or 0.0)
        case "adafactor":
            return Adafactor(groups(trained), lr=learning_rate)
        case "muon":
            return _muon(trained, groups, adamw, learning_rate, 0.95 if momentum is None else momentum)
        case _:
            raise ValueError(f"unknown optimiser {kind!r}; the kinds are {', '.join(KINDS)}")


def _can_fuse(named: Sequence[tuple[str, Parameter]]) -> bool:
    return all(parameter.device.type in _FUSED_DEVICES for _, parameter in named)


def _muon(
    trained: Sequence[tuple[str, Parameter]],
    groups: Callable[[NamedParameters], list[dict[str, Any]]],
    adamw: Callable[[Sequence[tuple[str, Parameter]]], torch.optim.Optimizer],
    learning_rate: float,
    momentum: float,
) -> torch.optim.Optimizer:
    matrices = [(name, parameter) for name, parameter in trained if is_hidden_matrix(name, parameter)]
    others = [(name, parameter) for name, parameter in trained if not is_hidden_matrix(name, parameter)]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        # Updates with the root mean square of AdamW's, so that one learning rate serves both parts (arXiv:2502.16982).
        parts.append(
            torch.optim.Muon(groups(matrices), lr=learning_rate, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        parts.append(adamw(others))
    return Combined(parts) if len(parts) > 1 else parts[0]


class Combined(OwnOptimizer):
    """Several optimisers as one: it holds the groups and the state of all its `parts` and steps them in order."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def step_all(self) -> None:
        """Steps each part once."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of all parts, as `state_dict` returned it."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Lets the parts work on this object's groups and state, so that both are always the same."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            part.state = self.state
            start = end
