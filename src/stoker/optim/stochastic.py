"""AdamW over weights that are kept in bf16, with averages in each weight's own type."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stoker.optim.base import OwnAdamW, Update
from stoker.optim.shared import held


class StochasticAdamW(OwnAdamW):
    """AdamW whose `update` rounds bf16 weights and averages stochastically; the state's names are those of torch's.

    A parameter's number, which chooses its random bits, is its place among all parameters; its step is a plain number
    in the state. Both come back with a checkpoint, and with them the bits. Of a weight that ranks share, each steps its
    own part. Gradients are scaled in fp32.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, update: Update, **options: Any) -> None:
        super().__init__(params, **options)
        self._update = update

    def step_all(self) -> None:
        """Steps every parameter that has a gradient."""
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group, number)
                number += 1

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        parts = (held(tensor) for tensor in (parameter, grad, state["exp_avg"], state["exp_avg_sq"]))
        self._update(*parts, number=number, **self.numbers(group, state["step"]))
