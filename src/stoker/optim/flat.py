"""AdamW over one buffer: all weights of a group, their gradients and their averages as one tensor each.

Adapters are hundreds of small tensors, and a step over a list of them is hundreds of launches and lookups. Side by side
in memory a group is stepped by one call. The parameters stay what they were: each is a view of the buffer, and so are
its averages in the state, whose names and numbers are those of torch's AdamW.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stoker.optim.base import OwnAdamW, Update

ALIGNMENT = 64
"""Values: each parameter begins at a multiple of 256 bytes, as tensors of their own do; kernels read wide words."""


class Layout:
    """Where each of `parameters` lies in a flat buffer; what is between them is zero."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.shapes = [parameter.shape for parameter in parameters]
        self.starts: list[int] = []
        self.size = 0
        for parameter in parameters:
            self.starts.append(self.size)
            self.size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns each parameter's part of `buffer` [size], in its shape."""
        return [
            buffer[start : start + shape.numel()].view(shape)
            for start, shape in zip(self.starts, self.shapes, strict=True)
        ]

    def gather(self, tensors: Sequence[Tensor | None], *, like: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns the tensors side by side [size], in `out` if given; None counts as zeros. `like`: dtype, device."""
        pieces: list[Tensor] = []
        for tensor, shape in zip(tensors, self.shapes, strict=True):
            count = shape.numel()
            pieces.append(like.new_zeros(count) if tensor is None else tensor.detach().reshape(-1))
            if count % ALIGNMENT:
                pieces.append(like.new_zeros(ALIGNMENT - count % ALIGNMENT))
        return torch.cat(pieces) if out is None else torch.cat(pieces, out=out)


class FlatAdamW(OwnAdamW):
    """AdamW that steps each group at once, with torch's own fused step or with `update`.

    Parameters are fp32, on one device, and moved into one buffer in the order of the groups. There is one count of
    steps: all of them are stepped every time, with a zero gradient where they have none.
    """

    state_of = "AdamW"
    """Whose state this is: a checkpoint of either optimiser can be resumed with the other."""

    def __init__(self, params: Iterable[dict[str, Any]], *, update: Update | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self._update = update
        self._gradient: Tensor | None = None
        self.parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters}
        if len(kinds) > 1 or self.parameters[0].dtype != torch.float32:
            raise ValueError(f"parameters that lie side by side are fp32 and on one device, not {kinds}")
        self.layout = Layout(self.parameters)
        self._weights = self.layout.gather(self.parameters, like=self.parameters[0])
        for parameter, view in zip(self.parameters, self.layout.views(self._weights), strict=True):
            parameter.data = view
        self._ends = self._group_ends()
        self._averages, self._squares = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        self._views = list(zip(*map(self.layout.views, (self._averages, self._squares)), strict=True))
        self._step = torch.zeros(())

    def _group_ends(self) -> list[int]:
        ends, count = [], 0
        for group in self.param_groups:
            count += len(group["params"])
            ends.append(self.layout.starts[count] if count < len(self.parameters) else self.layout.size)
        return ends

    def set_gradient(self, gradient: Tensor | None) -> None:
        """Gives the next step its gradient [layout.size]; with None it reads those of the parameters."""
        self._gradient = gradient

    def step_all(self) -> None:
        """Steps every parameter."""
        gradient = self._gradient
        if gradient is None:
            gradient = self.layout.gather([parameter.grad for parameter in self.parameters], like=self._weights)
        self._take_over_state()
        self._step += 1
        start = 0
        for group, end in zip(self.param_groups, self._ends, strict=True):
            parts = [flat[start:end] for flat in (self._weights, gradient, self._averages, self._squares)]
            self._step_group(group, parts)
            start = end

    def _step_group(self, group: dict[str, Any], parts: list[Tensor]) -> None:
        """One step of (weights, gradient, averages, square averages), each flat."""
        if self._update is not None:
            self._update(*parts, number=0, **self.numbers(group, int(self._step)))
            return
        weights, gradient, averages, squares = parts
        if self._gradient_scale != 1.0:
            gradient = gradient * self._gradient_scale
        step = self._step.to(weights.device, copy=True) - 1  # torch's step counts by itself
        torch.optim._functional.adamw(
            [weights],
            [gradient],
            [averages],
            [squares],
            [],
            [step],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _take_over_state(self) -> None:
        """Lets the state be views of the buffers, filled with what was put there, from a checkpoint for example."""
        steps: set[float] = set()
        is_new = False
        for parameter, (average, square) in zip(self.parameters, self._views, strict=True):
            state = self.state[parameter]
            if state.get("exp_avg") is average:
                continue
            is_new = True
            steps.add(float(state.get("step", 0.0)))
            for view, name in ((average, "exp_avg"), (square, "exp_avg_sq")):
                view.copy_(state[name]) if name in state else view.zero_()
            state.update(step=self._step, exp_avg=average, exp_avg_sq=square)
        if len(steps) > 1:
            raise ValueError(f"parameters that are stepped together were stepped {sorted(steps)} times")
        if is_new:
            self._step.fill_(steps.pop())
