"""What our own optimisers share: the closure of torch's interface, and AdamW's numbers with a scale for gradients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

Update = Callable[..., None]
"""Takes one parameter's step in place: (weight, gradient, average, square average, *, step, learning_rate, betas,
epsilon, weight_decay, gradient_scale, number)."""


class OwnOptimizer(torch.optim.Optimizer):
    """An optimiser that says in `step_all` how everything is stepped once, outside of autograd."""

    def step_all(self) -> None:
        """Steps every parameter once."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter once; returns what `closure`, which runs first, returned, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_all()
        return loss


class OwnAdamW(OwnOptimizer):
    """AdamW (arXiv:1711.05101) whose step multiplies gradients by a factor, so that clipping needs no pass of its own.

    Each of its kinds takes, beside how it steps, the options `lr`, `betas` (two) and `eps`.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: Sequence[float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": 0.0})
        self._gradient_scale = 1.0

    def scale_gradients(self, factor: float) -> None:
        """Lets the next step, and no other, multiply gradients by `factor`, without a pass over them."""
        self._gradient_scale = factor

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter once; returns what `closure`, which runs first, returned, if one was given."""
        loss = super().step(closure)
        self._gradient_scale = 1.0
        return loss

    def numbers(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        """Returns what an `Update` is told of a group's step number `step`, from 1."""
        return {
            "step": step,
            "learning_rate": group["lr"],
            "betas": group["betas"],
            "epsilon": group["eps"],
            "weight_decay": group["weight_decay"],
            "gradient_scale": self._gradient_scale,
        }
