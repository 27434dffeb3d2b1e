"""Norm of mean and deviation (arXiv:1607.06450), alone or fused with the residual sum before it.

    t = x + residual        h = (t − mean(t)) · r,  r = 1 / sqrt(var(t) + ε)        y = w · h + b
    g = w · dy              dt = r (g − mean(g) − h · mean(g · h)) + dt'
    dw = Σ_rows dy · h      db = Σ_rows dy

dt' is the gradient of t itself, the residual stream. Only t is saved: a row is in registers whole, in the backward too,
so that its statistics are taken again for less than reading them would need code. All sums are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.rms_norm import MAX_ROW_BLOCK, read_row
from stoker.kernels.triton_support import (
    as_rows,
    check_implementation,
    jit,
    next_power_of_2,
    num_programs,
    tl,
    warps_of_row,
)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """The formula in fp32 at least, by PyTorch's own kernel; rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        wide_bias = None if bias is None else bias.to(dtype)
        normed = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), wide_bias, epsilon)
    return normed.to(x.dtype)


def takes(x: Tensor, implementation: str) -> bool:
    """Whether the kernel runs rows like those of `x`; ValueError for an unknown implementation."""
    return check_implementation(implementation) and x.shape[-1] <= MAX_ROW_BLOCK and x.numel() > 0


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, implementation: str = "reference"
) -> Tensor:
    """Returns the norm of x [..., D] in its dtype; weight and bias (or None): [D].

    `implementation`: "reference" or "triton"; ValueError for an unknown one.
    """
    if takes(x, implementation):
        return _LayerNormTriton.apply(x, None, weight, bias, epsilon)
    return layer_norm_reference(x, weight, bias, epsilon)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    *,
    implementation: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Returns (layer_norm(residual + x), residual + x), both [..., D]; ValueError for an unknown implementation."""
    if takes(x, implementation):
        return _LayerNormTriton.apply(x, residual, weight, bias, epsilon)
    total = residual + x
    return layer_norm_reference(total, weight, bias, epsilon), total


@jit
def _forward_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    num_columns: tl.tensor,
    epsilon: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < num_columns
    x = read_row(x_ptr, residual_ptr, total_ptr, x_stride, residual_stride, row, column, num_columns, HAS_RESIDUAL)
    centred = tl.where(mask, x - tl.sum(x, axis=0) / num_columns, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / num_columns + epsilon)
    out = centred * rstd * tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_columns + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(  # noqa: PLR0917
    grad_ptr: tl.tensor,
    grad_total_ptr: tl.tensor,
    total_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    grad_stride: tl.tensor,
    grad_total_stride: tl.tensor,
    total_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    epsilon: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
) -> None:
    # As in rms_norm: a program takes every num_programs-th row and keeps its share of the sums over rows.
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < num_columns
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    partial_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    partial_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(row_index, tl.int64)
        x = tl.load(total_ptr + row * total_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - tl.sum(x, axis=0) / num_columns, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / num_columns + epsilon)
        normed = centred * rstd
        if WEIGHT_GRAD:
            partial_weight += grad * normed
            partial_bias += grad
        if INPUT_GRAD:
            scaled = grad * weight
            mean = tl.sum(scaled, axis=0) / num_columns
            dot = tl.sum(scaled * normed, axis=0) / num_columns
            grad_x = rstd * (scaled - mean - normed * dot)
            if HAS_GRAD_TOTAL:
                there = grad_total_ptr + row * grad_total_stride + column
                grad_x += tl.load(there, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + row * num_columns + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        here = partial_ptr + program.to(tl.int64) * 2 * num_columns + column
        tl.store(here, partial_weight, mask=mask)
        tl.store(here + num_columns, partial_bias, mask=mask)


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Returns (normed, total) for x [N, D] and a residual like it, or None; total is x without one."""
    num_rows, num_columns = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty((num_rows, num_columns), dtype=dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    block = next_power_of_2(num_columns)
    _forward_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        total,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_columns,
        epsilon,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        num_warps=warps_of_row(block),
    )
    return out, total


def launch_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of total [N, D], and of weight and bias [2, D] (fp32); each None where not needed."""
    num_rows, num_columns = total.shape
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device) if needs_input else None
    programs = min(num_rows, num_programs(total)) if needs_weight else num_rows
    shares = programs if needs_weight else 0
    partial = torch.empty((shares, 2, num_columns), dtype=torch.float32, device=total.device)
    block = next_power_of_2(num_columns)
    _backward_kernel[(programs,)](
        grad,
        grad if grad_total is None else grad_total,
        total,
        weight,
        total if grad_x is None else grad_x,
        partial,
        grad.stride(0),
        0 if grad_total is None else grad_total.stride(0),
        total.stride(0),
        num_rows,
        num_columns,
        epsilon,
        BLOCK=block,
        HAS_GRAD_TOTAL=grad_total is not None,
        WEIGHT_GRAD=needs_weight,
        INPUT_GRAD=needs_input,
        num_warps=warps_of_row(block),
    )
    return grad_x, partial.sum(0) if needs_weight else None


class _LayerNormTriton(torch.autograd.Function):
    """One launch forward and one backward; the residual's gradient is added inside."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
    ) -> tuple[Tensor, Tensor] | Tensor:
        """x and residual: [..., D]; returns normed, and with a residual the sum too."""
        rows = None if residual is None else as_rows(residual)
        normed, total = launch_forward(as_rows(x), rows, weight, bias, epsilon)
        ctx.save_for_backward(total, weight)
        ctx.epsilon = epsilon
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        normed = normed.view(x.shape)
        return normed if residual is None else (normed, total.view(x.shape))

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x, residual, weight and bias, each only where asked for."""
        total, weight = ctx.saved_tensors
        x_dtype, residual_dtype, bias_dtype = ctx.dtypes
        needs_x, needs_residual, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad, grad_total = grads[0], grads[1] if len(grads) > 1 else None
        grad_x, grad_weights = grad_total, None
        if grad is not None:
            grad_x, grad_weights = launch_backward(
                as_rows(grad),
                None if grad_total is None else as_rows(grad_total),
                total,
                weight,
                ctx.epsilon,
                needs_input=needs_x or needs_residual,
                needs_weight=needs_weight or needs_bias,
            )
            grad_x = None if grad_x is None else grad_x.view(grad.shape)
        return (
            grad_x.to(x_dtype) if grad_x is not None and needs_x else None,
            grad_x.to(residual_dtype) if grad_x is not None and needs_residual else None,
            grad_weights[0].to(weight.dtype) if grad_weights is not None and needs_weight else None,
            grad_weights[1].to(bias_dtype) if grad_weights is not None and needs_bias else None,
            None,
        )
