"""AdamW whose averages of large matrices take 8 bits a value."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.optim.base import OwnAdamW, Update
from stoker.optim.shared import held, zeros_in_rows_of

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
    `plain` those in fp32.

    `compress` makes code and scale of fp32 values, with the second argument of the first average's, which have signs;
    `expand` makes fp32 values of code and scale. Values that were expanded are compressed to what they were.
    """

    update: QuantizedUpdate
    plain: Update
    block_size: int
    compress: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    expand: Callable[[Tensor, Tensor], Tensor]


class EightBitAdamW(OwnAdamW):
    """AdamW with averages in 8 bits (arXiv:2110.02861), stepped by `kept`.

    Of a weight that ranks share, each steps and keeps its own rows. What is kept in 8 bits depends on the whole
    weight's shape, and no block of values crosses the end of a row, so any number of ranks computes what one does.

    Averages in a state that was put there in fp32, for example by a checkpoint of DeepSpeed's flat parts, are
    compressed at the next step.
    """

    steps_flat_parts = False
    """Whether parameters are flat parts of several weights, as DeepSpeed makes them; a row is then all of such a part,
    and where blocks begin depends on the number of ranks."""

    def __init__(self, params: Iterable[dict[str, Any]], *, kept: EightBit, **options: Any) -> None:
        super().__init__(params, **options)
        self._kept = kept

    def compress(self, parameter: Tensor) -> None:
        """Keeps a parameter's averages in 8 bits, if it is one of those that are kept so and they are not yet."""
        state, shape = self.state[parameter], parameter.shape
        if not state or "exp_avg_scale" in state or not self._is_compressed(parameter):
            return
        scales = torch.Size((*shape[:-1], -(-shape[-1] // self._kept.block_size)))
        for entry, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            made = zeros_in_rows_of(parameter, shape, dtype), zeros_in_rows_of(parameter, scales, torch.float32)
            values = self._kept.compress(held(state[entry]), dtype == torch.int8)
            for whole, part in zip(made, values, strict=True):
                held(whole).copy_(part)
            state[entry], state[f"{entry}_scale"] = made

    def expand(self, parameter: Tensor) -> None:
        """Keeps a parameter's averages in fp32 until they are compressed or stepped again."""
        state = self.state[parameter]
        for entry in ("exp_avg", "exp_avg_sq"):
            if f"{entry}_scale" in state:
                state[entry] = self.expanded(state[entry], state.pop(f"{entry}_scale"))

    def expanded(self, code: Tensor, scale: Tensor) -> Tensor:
        """Returns in fp32 what a state's code and scale stand for."""
        return self._kept.expand(code, scale)

    def _is_compressed(self, parameter: Tensor) -> bool:
        has_rows = parameter.ndim >= 2 or self.steps_flat_parts
        return has_rows and parameter.numel() >= MIN_VALUES and parameter.shape[-1] >= MIN_WIDTH

    def is_in_rows(self, entry: str, parameter: Tensor) -> bool:
        """Whether an entry of the state has a row for each of the parameter's: all tensors have."""
        del entry, parameter
        return True

    def step_all(self) -> None:
        """Steps every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        self.compress(parameter)
        state["step"] += 1
        numbers = self.numbers(group, state["step"])
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
        if not self._is_compressed(parameter):
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            return
        scales = torch.Size((*shape[:-1], -(-shape[-1] // self._kept.block_size)))
        # Codes of 0 stand for zeros.
        state["exp_avg"] = zeros_in_rows_of(parameter, shape, torch.int8)
        state["exp_avg_sq"] = zeros_in_rows_of(parameter, shape, torch.uint8)
        state["exp_avg_scale"] = zeros_in_rows_of(parameter, scales, torch.float32)
        state["exp_avg_sq_scale"] = zeros_in_rows_of(parameter, scales, torch.float32)
