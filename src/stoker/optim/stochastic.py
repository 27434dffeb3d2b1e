"""AdamW over weights that are kept in bf16, with averages in each weight's own type."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stoker.optim.shared import held

Update = Callable[..., None]
"""Takes one parameter's step in place: (weight, gradient, average, square average, *, step, learning_rate, betas,
epsilon, weight_decay, gradient_scale, number)."""


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose `update` rounds bf16 weights and averages stochastically; the state's names are those of torch's.

    A parameter's number, which chooses its random bits, is its place among all parameters; its step is a plain number
    in the state. Both come back with a checkpoint, and with them the bits. Of a weight that ranks share, each steps its
    own part.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: Sequence[float],
        eps: float,
        update: Update,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": 0.0})
        self._update = update
        self._gradient_scale = 1.0

    def scale_gradients(self, factor: float) -> None:
        """Lets the next step multiply gradients by `factor`, in fp32 and without a pass over them."""
        self._gradient_scale = factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter that has a gradient; returns what `closure` returned, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group, number)
                number += 1
        self._gradient_scale = 1.0
        return loss

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        self._update(
            held(parameter),
            held(grad),
            held(state["exp_avg"]),
            held(state["exp_avg_sq"]),
            step=state["step"],
            learning_rate=group["lr"],
            betas=group["betas"],
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            gradient_scale=self._gradient_scale,
            number=number,
        )
