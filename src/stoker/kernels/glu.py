"""Gated activations on gate and up as the two halves of one tensor (Shazeer 2020, arXiv:2002.05202).

    [g, u] = halves of gate_up         y = a(g) · u         du = dy · a(g)         dg = dy · u · a'(g)

    "silu" (SwiGLU)       a = g · σ(g)                       a' = σ(g) · (1 + g · (1 − σ(g)))
    "gelu" (GeGLU)        a = g · Φ(g)                       a' = Φ(g) + g · φ(g)             (arXiv:1606.08415)
    "gelu_tanh"           a = g · σ(z), z = √(8/π) · (g + 0.044715 g³), since (1 + tanh(z/2)) / 2 = σ(z)
                          a' = σ(z) + g · σ(z) · (1 − σ(z)) · √(8/π) · (1 + 3 · 0.044715 g²)

Saved for backward: gate_up only; a(g) is computed again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.triton_support import as_rows, check_implementation, constant, jit, next_power_of_2, tl, triton

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated_reference(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """The formula; the oracle of the implementations below."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _activated(gate, activation) * up


def gated(
    gate_up: Tensor, *, activation: str = "silu", implementation: str = "reference", overwrite: bool = False
) -> Tensor:
    """Returns `activation(gate) * up`: [..., 2F], gate first, to [..., F] of the same dtype.

    `activation`: one of ACTIVATIONS. `implementation`: "reference" or "triton". `overwrite` lets Triton's backward
    write the gradient over gate_up, for callers to whom it is of no further use; a second backward then raises
    RuntimeError. ValueError for an unknown name.
    """
    check_activation(activation)
    if check_implementation(implementation):
        return _GatedTriton.apply(gate_up, activation, overwrite)
    return _SwiGlu.apply(gate_up) if activation == "silu" else gated_reference(gate_up, activation)


def gated_backward(
    gate_up: Tensor, grad: Tensor, *, activation: str = "silu", implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Returns (gradient of gate_up [N, 2F], written over it; `gated(gate_up)` [N, F]), from the output's gradient.

    For callers that write their own backward and need the activation again for the layer after it. Both tensors are
    contiguous; Triton writes the activation over `grad`.
    """
    check_activation(activation)
    if check_implementation(implementation):
        return _launch_backward(gate_up, grad, gate_up, activation=activation, activated=grad), grad
    gate, up = gate_up.chunk(2, dim=-1)
    activated = _activated(gate, activation)
    grad_up = activated * grad
    activated = activated * up
    gate.copy_(_derivative(grad * up, gate, activation))
    up.copy_(grad_up)
    return gate_up, activated


def check_activation(activation: str) -> None:
    """Raises ValueError for a name that is not in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}; known: {', '.join(ACTIVATIONS)}")


def _activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _derivative(grad: Tensor, gate: Tensor, activation: str) -> Tensor:
    """The gradient of gate from that of its activation."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none")


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


_SQRT_HALF = constant(math.sqrt(0.5))
_INVERSE_SQRT_TAU = constant(1 / math.sqrt(2 * math.pi))
_SQRT_EIGHT_OVER_PI = constant(math.sqrt(8 / math.pi))
_CUBIC = constant(0.044715)


@jit
def activate(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Returns a(g) and a'(g), both fp32, for the names of ACTIVATIONS."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(gate * _SQRT_HALF))
        value = gate * below
        slope = below + gate * _INVERSE_SQRT_TAU * tl.exp(-0.5 * gate * gate)
    else:
        square = gate * gate
        z = gate * _SQRT_EIGHT_OVER_PI * (1 + square * _CUBIC)
        sigmoid = tl.sigmoid(z)
        value = gate * sigmoid
        # σ(−z), not 1 − σ(z): where z is large its factor is large too, and all digits count.
        slope = sigmoid + value * tl.sigmoid(-z) * _SQRT_EIGHT_OVER_PI * (1 + square * _CUBIC * 3)
    return value, slope


@jit
def _forward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + num_columns + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = activate(gate, ACTIVATION)
    tl.store(out_ptr + row * num_columns + column, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_gate_up_ptr: tl.tensor,
    activated_ptr: tl.tensor,
    row_stride: tl.tensor,
    grad_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_ACTIVATED: tl.constexpr,
) -> None:
    # Reads all it needs before it writes: gate_up may hold its gradient next, and grad the activation.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + num_columns + column, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(gate, ACTIVATION)
    dtype = grad_gate_up_ptr.dtype.element_ty
    out = grad_gate_up_ptr + row * 2 * num_columns + column
    tl.store(out, (grad * up * slope).to(dtype), mask=mask)
    tl.store(out + num_columns, (grad * value).to(dtype), mask=mask)
    if WITH_ACTIVATED:
        activated = (value * up).to(activated_ptr.dtype.element_ty)
        tl.store(activated_ptr + row * grad_stride + column, activated, mask=mask)


_BLOCK = 1024


def _launch_forward(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up [N, 2F], contiguous rows, to [N, F]."""
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, num_columns), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(_BLOCK, next_power_of_2(num_columns))
        grid = (num_rows, triton.cdiv(num_columns, block))
        _forward_kernel[grid](
            gate_up, out, gate_up.stride(0), num_columns, BLOCK=block, ACTIVATION=activation, num_warps=4
        )
    return out


def _launch_backward(
    gate_up: Tensor, grad: Tensor, out: Tensor, *, activation: str, activated: Tensor | None = None
) -> Tensor:
    """Gradient of gate_up [N, 2F] from grad [N, F] into `out`, which is contiguous and may be gate_up itself.

    `activated`, when given, takes gated(gate_up); it is laid out like `grad` and may be it.
    """
    num_rows, num_columns = grad.shape
    if grad.numel():
        block = min(_BLOCK, next_power_of_2(num_columns))
        _backward_kernel[(num_rows, triton.cdiv(num_columns, block))](
            gate_up,
            grad,
            out,
            grad if activated is None else activated,
            gate_up.stride(0),
            grad.stride(0),
            num_columns,
            BLOCK=block,
            ACTIVATION=activation,
            WITH_ACTIVATED=activated is not None,
            num_warps=4,
        )
    return out


class _GatedTriton(torch.autograd.Function):
    """One launch a direction; with `overwrite` the gradient takes the memory of gate_up, the largest tensor kept."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, overwrite: bool) -> Tensor:
        """gate_up: [..., 2F]."""
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.overwrite = activation, overwrite
        ctx.overwritten = False
        out = _launch_forward(as_rows(gate_up), activation)
        return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        """Gradient of gate_up; raises RuntimeError at a second backward after one that overwrote gate_up."""
        if ctx.overwritten:
            raise RuntimeError("gated: gate_up was overwritten by an earlier backward; use overwrite=False for two")
        (gate_up,) = ctx.saved_tensors
        ctx.overwritten = ctx.overwrite and gate_up.is_contiguous()
        out = gate_up if ctx.overwritten else torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        _launch_backward(as_rows(gate_up), as_rows(grads[0]), out, activation=ctx.activation)
        return out, None, None
