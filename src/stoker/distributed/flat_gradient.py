"""A step's gradient as one tensor, for optimisers that step all parameters at once.

Norm, clipping and clearing are then one launch each, however many parameters there are. Autograd gives each parameter
a gradient of its own, which is moved here after each micro-batch: while activations are held there are none.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Layout(Protocol):
    """Where each parameter lies in a flat tensor."""

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns each parameter's part of `buffer`, in its shape."""

    def gather(self, tensors: Sequence[Tensor | None], *, like: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns the tensors side by side, in `out` if given; None counts as zeros."""


class FlatOptimizer(Protocol):
    """An optimiser whose `parameters` lie in one buffer; `set_gradient` gives it that of the next step."""

    layout: Layout
    parameters: Sequence[nn.Parameter]

    def set_gradient(self, gradient: Tensor | None) -> None:
        """Gives the next step its gradient."""


class FlatGradient:
    """The sum of the micro-batches' gradients of `optimizer`'s parameters since the last step."""

    def __init__(self, optimizer: FlatOptimizer) -> None:
        self._optimizer = optimizer
        self._sum: Tensor | None = None
        self._norm: Tensor | None = None

    def gather(self, out: Tensor | None = None) -> Tensor:
        """Takes the gradients from the parameters, which have none afterwards, and returns them side by side."""
        parameters = self._optimizer.parameters
        grads = [parameter.grad for parameter in parameters]
        gathered = self._optimizer.layout.gather(grads, like=parameters[0], out=out)
        for parameter in parameters:
            parameter.grad = None
        return gathered

    def add(self, gradient: Tensor, *, is_last: bool, is_reused: bool = False) -> None:
        """Adds a micro-batch's gradient, `is_reused`: whose memory the next one overwrites.

        On the last one the norm is queued: by the time that it is asked for, the device has it.
        """
        if self._sum is None:
            self._sum = gradient.clone() if is_reused and not is_last else gradient
        else:
            self._sum.add_(gradient)
        self._norm = torch.linalg.vector_norm(self._sum) if is_last else None

    def hand_over(self, *, shown: bool) -> None:
        """Gives the optimiser the sum; `shown`: the parameters have their parts of it too, as a loss scaler needs."""
        if self._sum is None:
            raise RuntimeError("there is no gradient: no micro-batch has run since the last step")
        self._optimizer.set_gradient(self._sum)
        if shown:
            self._norm = None
            views = self._optimizer.layout.views(self._sum)
            for parameter, view in zip(self._optimizer.parameters, views, strict=True):
                parameter.grad = view

    def norm(self) -> Tensor:
        """Returns the norm of the sum, a scalar on the device."""
        if self._norm is not None:
            return self._norm
        assert self._sum is not None
        return torch.linalg.vector_norm(self._sum)

    def clear(self) -> None:
        """Forgets the sum."""
        self._optimizer.set_gradient(None)
        self._sum = self._norm = None
