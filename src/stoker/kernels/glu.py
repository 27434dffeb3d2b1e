"""SwiGLU (Shazeer 2020, arXiv:2002.05202) on gate and up as the two halves of one tensor.

    [g, u] = halves of gate_up         y = silu(g) · u,  silu(g) = g · σ(g)

    du = dy · silu(g)                  dg = dy · u · σ(g) · (1 + g · (1 − σ(g)))

Saved for backward: gate_up only; silu(g) is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.triton_support import as_rows, check_implementation, jit, next_power_of_2, tl, triton


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The formula; the oracle of the implementation below."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu(gate_up: Tensor, *, implementation: str = "reference", overwrite: bool = False) -> Tensor:
    """Returns `silu(gate) * up`: [..., 2F], gate first, to [..., F] of the same dtype.

    `implementation`: "reference" or "triton"; ValueError for an unknown one. `overwrite` lets Triton's backward write
    the gradient over gate_up, for callers to whom it is of no further use; a second backward then raises RuntimeError.
    """
    if check_implementation(implementation):
        return _SwiGluTriton.apply(gate_up, overwrite)
    return _SwiGlu.apply(gate_up)


def swiglu_backward(gate_up: Tensor, grad: Tensor, *, implementation: str = "reference") -> tuple[Tensor, Tensor]:
    """Returns (gradient of gate_up [N, 2F], written over it; `swiglu(gate_up)` [N, F]), from the output's gradient.

    For callers that write their own backward and need the activation again for the layer after it. Both tensors are
    contiguous; Triton writes the activation over `grad`.
    """
    if check_implementation(implementation):
        return _launch_backward(gate_up, grad, gate_up, activated=grad), grad
    gate, up = gate_up.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate)
    grad_up = activated * grad
    activated.mul_(up)
    gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    up.copy_(grad_up)
    return gate_up, activated


class _SwiGlu(torch.autograd.Function):
    """Plain torch with the backward written out, straight into the two halves of the gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """gate_up: [..., 2F]."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Gradient of gate_up."""
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        # In place: fresh memory of this size costs a CPU more in page faults than the arithmetic does.
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate_up


@jit
def _swiglu_forward_kernel(
    gate_up_ptr: tl.tensor, out_ptr: tl.tensor, row_stride: tl.tensor, num_columns: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + num_columns + column, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * num_columns + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_gate_up_ptr: tl.tensor,
    activated_ptr: tl.tensor,
    row_stride: tl.tensor,
    grad_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    WITH_ACTIVATED: tl.constexpr,
) -> None:
    # Reads all it needs before it writes: gate_up may hold its gradient next, and grad the activation.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + num_columns + column, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dtype = grad_gate_up_ptr.dtype.element_ty
    out = grad_gate_up_ptr + row * 2 * num_columns + column
    tl.store(out, (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=mask)
    tl.store(out + num_columns, (grad * gate * sigmoid).to(dtype), mask=mask)
    if WITH_ACTIVATED:
        activated = (gate * sigmoid * up).to(activated_ptr.dtype.element_ty)
        tl.store(activated_ptr + row * grad_stride + column, activated, mask=mask)


_SWIGLU_BLOCK = 1024


def _launch_forward(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2F], contiguous rows, to [N, F]."""
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, num_columns), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(_SWIGLU_BLOCK, next_power_of_2(num_columns))
        grid = (num_rows, triton.cdiv(num_columns, block))
        _swiglu_forward_kernel[grid](gate_up, out, gate_up.stride(0), num_columns, BLOCK=block, num_warps=4)
    return out


def _launch_backward(gate_up: Tensor, grad: Tensor, out: Tensor, *, activated: Tensor | None = None) -> Tensor:
    """Gradient of gate_up [N, 2F] from grad [N, F] into `out`, which is contiguous and may be gate_up itself.

    `activated`, when given, takes swiglu(gate_up); it is laid out like `grad` and may be it.
    """
    num_rows, num_columns = grad.shape
    if grad.numel():
        block = min(_SWIGLU_BLOCK, next_power_of_2(num_columns))
        _swiglu_backward_kernel[(num_rows, triton.cdiv(num_columns, block))](
            gate_up,
            grad,
            out,
            grad if activated is None else activated,
            gate_up.stride(0),
            grad.stride(0),
            num_columns,
            BLOCK=block,
            WITH_ACTIVATED=activated is not None,
            num_warps=4,
        )
    return out


class _SwiGluTriton(torch.autograd.Function):
    """One launch a direction; with `overwrite` the gradient takes the memory of gate_up, the largest tensor kept."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, overwrite: bool) -> Tensor:
        """gate_up: [..., 2F]."""
        ctx.save_for_backward(gate_up)
        ctx.overwrite = overwrite
        ctx.overwritten = False
        out = _launch_forward(as_rows(gate_up))
        return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        """Gradient of gate_up; raises RuntimeError at a second backward after one that overwrote gate_up."""
        if ctx.overwritten:
            raise RuntimeError("swiglu: gate_up was overwritten by an earlier backward; use overwrite=False for two")
        (gate_up,) = ctx.saved_tensors
        ctx.overwritten = ctx.overwrite and gate_up.is_contiguous()
        out = gate_up if ctx.overwritten else torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        _launch_backward(as_rows(gate_up), as_rows(grads[0]), out)
        return out, None
