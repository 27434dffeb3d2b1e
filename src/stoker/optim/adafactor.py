"""Adafactor: the average of squared gradients of a matrix as a row and a column of means."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stoker.optim.base import OwnOptimizer
from stoker.optim.shared import held, sum_over_parts, zeros_in_rows_of

_DECAY = 0.8
_LEAST_SQUARE = 1e-30
_MAX_RMS = 1.0


@dataclass
class _Part:
    """What a step knows of one parameter: `update` is its gradient at first; sums are fp32, over the whole of it."""

    parameter: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    update: Tensor
    kept: float
    sums: Tensor

    @property
    def spans_ranks(self) -> bool:
        """Whether it is a matrix whose rows ranks share, so that means over its rows are of all of them."""
        return isinstance(self.parameter, DTensor) and self.parameter.ndim == 2


class Adafactor(OwnOptimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4) without a first average, at the rate given.

        b = 1 − t^−0.8        q = g² + 1e−30
        r ← b r + (1 − b) mean of q over columns        c ← b c + (1 − b) mean of q over rows
        u = g / √(r c / mean r)        w ← w (1 − η λ) − η u / max(1, rms u)

    The last two dimensions of a tensor are its rows and columns; one of fewer than two keeps b q + … as it is. Rates
    are not multiplied by the weight's own size: one chosen for AdamW would train some fifty times slower.

    Of weights that ranks share, each rank keeps its rows' part of r, and all keep c. Two sums over ranks a step, for
    all parameters together, give the means over rows and each update's size. Gradients are written over.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def is_in_rows(self, entry: str, parameter: Tensor) -> bool:
        """Whether an entry of the state has a row for each of the parameter's: not a matrix' means of its columns."""
        return entry != "exp_avg_sq_col" or parameter.ndim > 2

    def step_all(self) -> None:
        """Steps every parameter that has a gradient."""
        parts = [
            self._begin(parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        spanning = [part for part in parts if part.spans_ranks]
        sum_over_parts([part.parameter for part in spanning], [part.sums for part in spanning])
        for part in parts:
            _scale(part)
        sum_over_parts([part.parameter for part in parts], [part.sums for part in parts])
        for part in parts:
            _apply(part)

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> _Part:
        """Averages squared gradients as far as this rank's rows allow; `sums` are those over them of q and of r."""
        state = self.state[parameter]
        if not state:
            _start(parameter, state)
        state["step"] += 1
        kept = 1.0 - state["step"] ** -_DECAY
        grad = held(parameter.grad).float()  # type: ignore[arg-type]
        squares = grad.square().add_(_LEAST_SQUARE)
        part = _Part(parameter, group, state, grad, kept, squares.new_empty(0))
        if parameter.ndim < 2:
            held(state["exp_avg_sq"]).mul_(kept).add_(squares, alpha=1.0 - kept)
            return part
        row = held(state["exp_avg_sq_row"]).mul_(kept).add_(squares.mean(-1), alpha=1.0 - kept)
        part.sums = torch.cat((squares.sum(-2), row.sum(-1, keepdim=True)), -1)
        return part


def _start(parameter: Tensor, state: dict[str, Any]) -> None:
    shape = parameter.shape
    state["step"] = 0
    if parameter.ndim < 2:
        state["exp_avg_sq"] = zeros_in_rows_of(parameter, shape, torch.float32)
        return
    state["exp_avg_sq_row"] = zeros_in_rows_of(parameter, shape[:-1], torch.float32)
    columns = torch.Size((*shape[:-2], shape[-1]))
    if parameter.ndim == 2:
        state["exp_avg_sq_col"] = torch.zeros(columns, device=held(parameter).device)
    else:
        state["exp_avg_sq_col"] = zeros_in_rows_of(parameter, columns, torch.float32)


def _scale(part: _Part) -> None:
    """Makes the gradient the update u; `sums` become those of this rank's u²."""
    state, update, kept = part.state, part.update, part.kept
    if part.parameter.ndim < 2:
        update.mul_(held(state["exp_avg_sq"]).rsqrt())
    else:
        num_rows = part.parameter.shape[-2]
        column = held(state["exp_avg_sq_col"])
        column.mul_(kept).add_(part.sums[..., :-1], alpha=(1.0 - kept) / num_rows)
        mean = part.sums[..., -1:] / num_rows
        update.mul_((held(state["exp_avg_sq_row"]) / mean).rsqrt_().unsqueeze(-1))
        update.mul_(column.rsqrt().unsqueeze(-2))
    part.sums = update.square().sum().view(1)


def _apply(part: _Part) -> None:
    weight, rate = held(part.parameter), part.group["lr"]
    size = (part.sums / part.parameter.numel()).sqrt_()
    part.update.mul_(rate / (size / _MAX_RMS).clamp_(min=1.0))
    if part.group["weight_decay"]:
        weight.mul_(1.0 - rate * part.group["weight_decay"])
    weight.sub_(part.update)
