"""Attention that a layer with its own backward runs under a small graph of its own, which keeps what it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.offload import HostOffload


class _Source(torch.autograd.Function):
    """Hands q, k and v to a graph that must not keep them alive, and takes their gradients from it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, sink: list[Tensor], *heads: Tensor) -> tuple[Tensor, ...]:
        del root  # only makes the outputs require gradients
        ctx.sink = sink
        return tuple(x.view_as(x) for x in heads)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        ctx.sink.extend(grads)
        return grads[0].new_zeros(()), None, None, None, None


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, T, heads, E] to attended values [B, T, H · E]."""


class KeptAttention:
    """Attention with a graph of its own, from rotated q, k, v to the attended values [B, T, H · E].

    With `forget`, the graph does not hold q, k and v: `backward` is given them anew. What attention keeps besides (its
    output and statistics) stays, or waits on the host with an `offload`.
    """

    def __init__(
        self, attend: Attend, heads: tuple[Tensor, ...], *, forget: bool = False, offload: HostOffload | None = None
    ) -> None:
        self._heads: tuple[Tensor, ...] = ()
        self._sink: list[Tensor] = []
        self._offload = offload
        self._handles: dict[int, tuple[int, int]] = {}  # of a storage: handle, and where its stored tensor begins
        self._storages = [x.untyped_storage().data_ptr() for x in heads] if forget else []
        self._root = torch.zeros((), dtype=heads[0].dtype, device=heads[0].device, requires_grad=True)
        with torch.enable_grad():
            traced = _Source.apply(self._root, self._sink, *heads)
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                output = attend(*traced)
        self._edge = torch.autograd.graph.get_gradient_edge(output)
        self._output: Tensor | None = output.detach()
        self._view: tuple[int, tuple] | None = None

    def _pack(self, tensor: Tensor) -> Tensor | tuple:
        storage = tensor.untyped_storage().data_ptr()
        if storage in self._storages:
            return self._storages.index(storage), tensor.shape, tensor.stride(), tensor.storage_offset()
        if self._offload is None or storage in self._handles or not self._offload.takes(tensor):
            return tensor
        handle = self._offload.store(tensor.detach())
        self._handles[storage] = (handle, int(tensor.storage_offset()))
        return (handle,)

    def _unpack(self, packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if len(packed) == 1 and self._offload is not None:
            return self._offload.fetch(packed[0])
        index, shape, stride, offset = packed
        return self._heads[index].as_strided(shape, stride, offset)

    def values(self) -> Tensor:
        """The output [B, T, H · E], brought back if it was put away."""
        if self._output is not None:
            return self._output
        if self._offload is None or self._view is None:
            raise RuntimeError("the attended values are gone")
        handle, view = self._view
        return self._offload.fetch(handle).as_strided(*view)

    def put_away(self) -> None:
        """Drops the output from the device, if it is to wait on the host."""
        if self._offload is None or self._output is None:
            return
        output, storage = self._output, self._output.untyped_storage().data_ptr()
        if storage not in self._handles:  # attention keeps another tensor than its output
            if not self._offload.takes(output):
                return
            self._handles[storage] = (self._offload.store(output), int(output.storage_offset()))
        handle, begin = self._handles[storage]
        self._view = (handle, (output.shape, output.stride(), int(output.storage_offset()) - begin))
        self._output = None

    def backward(self, grad: Tensor, heads: tuple[Tensor, ...] = ()) -> list[Tensor]:
        """Gradients of q, k and v, from that of the output; `heads` are they, where they were forgotten.

        It lets go of the output, and of all that attention kept.
        """
        self._heads, self._output = heads, None
        torch.autograd.grad((self._edge,), (self._root,), (grad,))
        self._heads = ()
        if self._offload is not None:
            for handle, _ in self._handles.values():
                self._offload.release(handle)
        grads = list(self._sink)
        self._sink.clear()  # the graph, which may live on, holds the same list
        return grads
