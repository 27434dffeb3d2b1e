"""AdamW whose averages of large matrices take 8 bits a value."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.optim.shared import held, zeros_in_rows_of
from stoker.optim.stochastic import Update

MIN_VALUES = 4096
"""Smaller weights keep fp32 averages, as in bitsandbytes (arXiv:2110.02861)."""
MIN_WIDTH = 8
"""So do those with shorter rows, whose scales would take half of what is saved, and those without rows."""

QuantizedUpdate = Callable[..., None]
"""Takes one parameter's step in place: (weight, gradient, (code, scale) of the average, (code, scale) of the square
average, *, step, learning_rate, betas, epsilon, weight_decay, gradient_scale)."""


@dataclass(frozen=True)
class EightBit:
    """How averages are kept: `update` steps those in 8 bits, of which `block_size` values of a row share a scale, and
    `plain` those in fp32."""

    update: QuantizedUpdate
    plain: Update
    block_size: int


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with averages in 8 bits (arXiv:2110.02861), stepped by `kept`.

    Of a weight that ranks share, each steps and keeps its own rows. What is kept in 8 bits depends on the whole
    weight's shape, and no block of values crosses the end of a row, so any number of ranks computes what one does.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: Sequence[float],
        eps: float,
        kept: EightBit,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": 0.0})
        self._kept = kept
        self._gradient_scale = 1.0

    def scale_gradients(self, factor: float) -> None:
        """Lets the next step multiply gradients by `factor`, without a pass over them."""
        self._gradient_scale = factor

    def is_in_rows(self, entry: str, parameter: Tensor) -> bool:
        """Whether an entry of the state has a row for each of the parameter's: all tensors have."""
        del entry, parameter
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter that has a gradient; returns what `closure` returned, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
        self._gradient_scale = 1.0
        return loss

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        state["step"] += 1
        numbers = {
            "step": state["step"],
            "learning_rate": group["lr"],
            "betas": group["betas"],
            "epsilon": group["eps"],
            "weight_decay": group["weight_decay"],
            "gradient_scale": self._gradient_scale,
        }
        weight, grad = held(parameter), held(grad)
        average, square = held(state["exp_avg"]), held(state["exp_avg_sq"])
        if "exp_avg_scale" not in state:
            self._kept.plain(weight, grad, average, square, number=0, **numbers)
            return
        scales = held(state["exp_avg_scale"]), held(state["exp_avg_sq_scale"])
        self._kept.update(weight, grad, (average, scales[0]), (square, scales[1]), **numbers)

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        shape = parameter.shape
        state["step"] = 0
        if parameter.ndim < 2 or parameter.numel() < MIN_VALUES or shape[-1] < MIN_WIDTH:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            return
        scales = torch.Size((*shape[:-1], -(-shape[-1] // self._kept.block_size)))
        # Codes of 0 stand for zeros.
        state["exp_avg"] = zeros_in_rows_of(parameter, shape, torch.int8)
        state["exp_avg_sq"] = zeros_in_rows_of(parameter, shape, torch.uint8)
        state["exp_avg_scale"] = zeros_in_rows_of(parameter, scales, torch.float32)
        state["exp_avg_sq_scale"] = zeros_in_rows_of(parameter, scales, torch.float32)
