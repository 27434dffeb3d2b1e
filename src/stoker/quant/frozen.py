"""What every frozen weight format offers, and the pieces that they share."""

from collections.abc import Callable
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class FrozenWeight(Protocol):
    """A weight W `[out, in]` that is never trained, whatever it is stored as.

    Adapters need no more than these: the stored form stays behind the two products.
    """

    @property
    def shape(self) -> torch.Size:
        """`[out, in]`."""
        ...

    def dequantize(self, out: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
        """Returns W in `dtype`; written into `out` (contiguous `[out, in]`) when given."""
        ...

    accumulates: bool
    """Whether a product can add to `onto` for less than a pass over it."""

    def matmul(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `x @ W.T`, `[..., in]` to `[..., out]`, in the dtype of `x`; added to `onto` [N, out] if given."""
        ...

    def matmul_transposed(self, grad: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `grad @ W`, `[..., out]` to `[..., in]`, in the dtype of `grad`; added to `onto` [N, in] if given."""
        ...


class Scratch:
    """One buffer for each device and dtype, as large as the largest weight, in which weights are dequantised in turn.

    A tensor from `take` is valid until the next `take`. That is enough because a device runs kernels of one stream in
    order: a matmul has read the buffer before the next weight overwrites it. Use one object for each stream.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, shape: torch.Size | tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an uninitialised contiguous tensor of `shape` in the shared buffer, which grows if it must."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < size:
            self._buffers.pop((device, dtype), None)  # frees the smaller one before the larger one is made
            buffer = self._buffers[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    @property
    def num_bytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())


class FrozenBuffers(nn.Module):
    """A module whose buffers change device but never dtype: `model.to(torch.bfloat16)` leaves scales exact."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes that the stored form takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class DequantizedProducts(FrozenBuffers):
    """A stored weight that is dequantised before each product, in `scratch` where it has one."""

    shape: torch.Size
    scratch: Scratch | None

    accumulates = True

    def dequantize(self, out: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
        """Returns W in `dtype` `[out, in]`, in `out` when given."""
        raise NotImplementedError

    def _as(self, factor: Tensor) -> Tensor:
        """Returns W in the dtype of what it is multiplied with."""
        if self.scratch is None:
            return self.dequantize(dtype=factor.dtype)
        out = self.scratch.take(self.shape, dtype=factor.dtype, device=factor.device)
        return self.dequantize(out, dtype=factor.dtype)

    def matmul(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `x @ W.T`, `[..., in]` to `[..., out]`; added to `onto` [N, out] in place if given."""
        weight = self._as(x).T
        return x @ weight if onto is None else onto.addmm_(x, weight)

    def matmul_transposed(self, grad: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `grad @ W`, `[..., out]` to `[..., in]`; added to `onto` [N, in] in place if given."""
        weight = self._as(grad)
        return grad @ weight if onto is None else onto.addmm_(grad, weight)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        output = weight.matmul(x)
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad,) = grads
        grad_x = ctx.weight.matmul_transposed(grad) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, grad_bias


def frozen_linear(x: Tensor, weight: FrozenWeight, *, bias: Tensor | None = None) -> Tensor:
    """Returns `x @ W.T + bias` with gradients for `x` and `bias`; saves neither `x` nor a dequantised W."""
    return _FrozenLinear.apply(x, weight, bias)
