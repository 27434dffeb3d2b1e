"""Attention that a layer with its own backward runs under a small graph of its own, which keeps what it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

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


class _Packing:
    """What attention's graph saves, and how.

    An object of its own: the graph holds these hooks, and were they methods of what holds the graph, neither would ever
    be freed without a backward, as after a forward that ran out of memory (Python does not see a circle through C++).
    """

    def __init__(self, heads: tuple[Tensor, ...], offload: HostOffload | None) -> None:
        self.heads: tuple[Tensor, ...] = ()
        self.offload = offload
        # Of storages that may be gone by now: addresses would be another's then.
        self.handles: dict[StorageWeakRef, int] = {}
        self._storages = [x.untyped_storage().data_ptr() for x in heads]

    def pack(self, tensor: Tensor) -> Tensor | tuple:
        """Drops heads that are given anew, and hands to the host what it takes."""
        storage = tensor.untyped_storage().data_ptr()
        view = (tensor.shape, tensor.stride(), tensor.storage_offset())
        if storage in self._storages:
            return (None, self._storages.index(storage), *view)
        handle = self.put_away(tensor)
        # Attention's own output, as it is, would hold the graph that saves it.
        return tensor.detach() if handle is None else (handle, None, *view)

    def put_away(self, tensor: Tensor) -> int | None:
        """Returns the handle of a tensor's storage on the host, stored if it was not; None if it stays.

        All of a storage goes: q, k and v lie in one, with gaps each of them, and what is left of it would hold it here.
        """
        storage = tensor.untyped_storage()
        known = StorageWeakRef(storage)
        if self.offload is None or known in self.handles:
            return self.handles.get(known)
        count = storage.nbytes() // tensor.element_size()
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (count,), (1,))
        if not self.offload.takes(whole):
            return None
        self.handles[known] = handle = self.offload.store(whole)
        return handle

    def unpack(self, packed: Tensor | tuple) -> Tensor:
        """The tensor again."""
        if isinstance(packed, Tensor):
            return packed
        handle, index, *view = packed
        if handle is not None and self.offload is not None:
            return self.offload.fetch(handle).as_strided(*view)
        return self.heads[index].as_strided(*view)


class KeptAttention:
    """Attention with a graph of its own, from rotated q, k, v to the attended values [B, T, H · E].

    With `forget`, the graph does not hold q, k and v: `backward` is given them anew. What attention keeps besides (its
    output and statistics) stays, or waits on the host with an `offload`.
    """

    def __init__(
        self, attend: Attend, heads: tuple[Tensor, ...], *, forget: bool = False, offload: HostOffload | None = None
    ) -> None:
        self._sink: list[Tensor] = []
        self._packing = _Packing(heads if forget else (), offload)
        self._root = torch.zeros((), dtype=heads[0].dtype, device=heads[0].device, requires_grad=True)
        with torch.enable_grad():
            traced = _Source.apply(self._root, self._sink, *heads)
            with torch.autograd.graph.saved_tensors_hooks(self._packing.pack, self._packing.unpack):
                output = attend(*traced)
        self._edge = torch.autograd.graph.get_gradient_edge(output)
        self._output: Tensor | None = output.detach()
        self._view: tuple[int, tuple] | None = None

    def values(self) -> Tensor:
        """The output [B, T, H · E], brought back if it was put away."""
        if self._output is not None:
            return self._output
        if self._packing.offload is None or self._view is None:
            raise RuntimeError("the attended values are gone")
        handle, view = self._view
        return self._packing.offload.fetch(handle).as_strided(*view)

    def put_away(self) -> None:
        """Drops the output from the device, if it is to wait on the host."""
        output = self._output
        handle = None if output is None else self._packing.put_away(output)
        if output is not None and handle is not None:
            self._view = (handle, (output.shape, output.stride(), output.storage_offset()))
            self._output = None

    def backward(self, grad: Tensor, heads: tuple[Tensor, ...] = ()) -> list[Tensor]:
        """Gradients of q, k and v, from that of the output; `heads` are they, where they were forgotten.

        It lets go of the output, and of all that attention kept.
        """
        self._packing.heads, self._output = heads, None
        torch.autograd.grad((self._edge,), (self._root,), (grad,))
        self._packing.heads = ()
        if self._packing.offload is not None:
            for handle in self._packing.handles.values():
                self._packing.offload.release(handle)
        grads = list(self._sink)
        self._sink.clear()  # the graph, which may live on, holds the same list
        return grads
