"""Root-mean-square norm (arXiv:1910.07467), alone and fused with the residual add before it.

    r = (mean(x²) + ε)^-½          y = x · r · w

    g  = dy · w                    dx = r · g − x · (r³ / D) · Σ_d (g · x)
    dw = Σ_rows dy · x · r

Saved for backward: x and r (one number a row). Statistics are fp32 whatever the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.fp8 import Rounded, store_rounded
from stoker.kernels.triton_support import (
    MAX_ROW_BLOCK,
    as_rows,
    check_implementation,
    jit,
    next_power_of_2,
    num_programs,
    tl,
    warps_of_row,
)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The formula, step by step, in fp32 at least; the oracle of the implementations below."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed * weight.to(dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, implementation: str = "reference") -> Tensor:
    """Returns `x` over its root mean square times `weight`, in the dtype of `x`.

    x: [..., D]; weight: [D]. `implementation`: "reference" or "triton"; ValueError for an unknown one.
    """
    if check_implementation(implementation) and x.shape[-1] <= MAX_ROW_BLOCK:
        return _RmsNormTriton.apply(x, None, weight, epsilon)
    return _RmsNorm.apply(x, weight, epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(residual + x), residual + x), both [..., D]; ValueError for an unknown implementation."""
    if check_implementation(implementation) and x.shape[-1] <= MAX_ROW_BLOCK:
        return _RmsNormTriton.apply(x, residual, weight, epsilon)
    total = residual + x
    return _RmsNorm.apply(total, weight, epsilon), total


class _RmsNorm(torch.autograd.Function):
    """Plain torch with the backward written out: half of autograd's passes over x, and only x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x: [..., D], weight: [D]."""
        wide = x if x.dtype == torch.float32 else x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return torch.mul(wide, rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x and weight, each only where asked for."""
        x, weight, rstd = ctx.saved_tensors
        wide = x if x.dtype == torch.float32 else x.float()
        grad = grads[0] if grads[0].dtype == torch.float32 else grads[0].float()
        grad_x = grad_weight = None
        # dy · x serves both sums, each of them then a matrix-vector product.
        product = grad * wide
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mv(product.reshape(-1, x.shape[-1]).t(), rstd.flatten()).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dot = torch.mv(product.reshape(-1, x.shape[-1]), weight.float()).view(rstd.shape)
            coefficient = dot.mul_(rstd.pow(3)).div_(x.shape[-1])
            grad_x = torch.mul(grad, weight, out=product).mul_(rstd).addcmul_(wide, coefficient, value=-1).to(x.dtype)
        return grad_x, grad_weight, None


@jit
def read_row(  # noqa: PLR0917
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    total_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    num_columns: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
) -> tl.tensor:
    """Returns a row in fp32, 0 beyond `num_columns`; with a residual the sum, which is written to `total_ptr` too."""
    mask = column < num_columns
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        # Rounded before the statistics are taken: the backward sees only the stored sum.
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * num_columns + column, total, mask=mask)
        x = total.to(tl.float32)
    return x


@jit
def _forward_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    rounded_ptr: tl.tensor,
    rounded_scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    num_columns: tl.tensor,
    epsilon: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < num_columns
    x = read_row(x_ptr, residual_ptr, total_ptr, x_stride, residual_stride, row, column, num_columns, HAS_RESIDUAL)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / num_columns + epsilon)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    out = (x * rstd * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_columns + column, out, mask=mask)
    if ROUNDS:
        store_rounded(out.to(tl.float32), rounded_ptr, rounded_scale_ptr, row, column, num_columns)


@jit
def _backward_kernel(  # noqa: PLR0917
    grad_ptr: tl.tensor,
    grad_total_ptr: tl.tensor,
    total_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    rounded_ptr: tl.tensor,
    rounded_scale_ptr: tl.tensor,
    grad_stride: tl.tensor,
    grad_total_stride: tl.tensor,
    total_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    # A program takes every num_programs-th row and keeps its share of the weight's gradient in registers: the shares
    # are summed afterwards in a fixed order, without atomics, so that two runs agree bit for bit.
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < num_columns
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    partial = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(row_index, tl.int64)
        x = tl.load(total_ptr + row * total_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if WEIGHT_GRAD:
            partial += grad * x * rstd
        if INPUT_GRAD:
            scaled = grad * weight
            dot = tl.sum(scaled * x, axis=0) / num_columns
            grad_x = rstd * scaled - (rstd * rstd * rstd * dot) * x
            if HAS_GRAD_TOTAL:
                grad_x += tl.load(grad_total_ptr + row * grad_total_stride + column, mask=mask, other=0.0).to(
                    tl.float32
                )
            narrow = grad_x.to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + row * num_columns + column, narrow, mask=mask)
            if ROUNDS:
                factor = tl.load(factor_ptr + column, mask=mask, other=0.0)
                store_rounded(narrow.to(tl.float32) * factor, rounded_ptr, rounded_scale_ptr, row, column, num_columns)
    if WEIGHT_GRAD:
        tl.store(partial_ptr + program.to(tl.int64) * num_columns + column, partial, mask=mask)


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, *, rounded: Rounded | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (normed, total, rstd) for x [N, D] and a residual like it, or None; total is x without one.

    `rounded`, of [N, D], takes the normed rows in fp8 as well.
    """
    num_rows, num_columns = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty((num_rows, num_columns), dtype=dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(num_columns)
    if num_rows:
        _forward_kernel[(num_rows,)](
            x,
            x if residual is None else residual,
            weight,
            total,
            out,
            rstd,
            *((out, rstd) if rounded is None else rounded),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            num_columns,
            epsilon,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            ROUNDS=rounded is not None,
            num_warps=warps_of_row(block),
        )
    return out, total, rstd


def launch_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    needs_input: bool,
    needs_weight: bool,
    rounded: Rounded | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of total [N, D] and of weight [D] (fp32); each None where not needed.

    `rounded`, of [N, D], takes the former times `factor`, fp32 [D], in fp8 as well.
    """
    num_rows, num_columns = total.shape
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device) if needs_input else None
    # Without a weight gradient nothing is carried from row to row, and every row gets its own program.
    programs = min(num_rows, num_programs(total)) if needs_weight else num_rows
    partial = torch.empty((programs, num_columns), dtype=torch.float32, device=total.device) if needs_weight else None
    block = next_power_of_2(num_columns)
    if num_rows:
        _backward_kernel[(programs,)](
            grad,
            grad if grad_total is None else grad_total,
            total,
            weight,
            rstd,
            total if grad_x is None else grad_x,
            rstd if partial is None else partial,
            rstd if factor is None else factor,
            *((total, rstd) if rounded is None else rounded),
            grad.stride(0),
            0 if grad_total is None else grad_total.stride(0),
            total.stride(0),
            num_rows,
            num_columns,
            BLOCK=block,
            HAS_GRAD_TOTAL=grad_total is not None,
            WEIGHT_GRAD=needs_weight,
            INPUT_GRAD=needs_input,
            ROUNDS=rounded is not None,
            num_warps=warps_of_row(block),
        )
    return grad_x, None if partial is None else partial.sum(0)


class _RmsNormTriton(torch.autograd.Function):
    """One launch forward and one backward; the residual's gradient is added inside."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor] | Tensor:
        """x and residual: [..., D]; returns normed, and with a residual the sum too."""
        rows = None if residual is None else as_rows(residual)
        normed, total, rstd = launch_forward(as_rows(x), rows, weight, epsilon)
        ctx.save_for_backward(total, weight, rstd)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        normed = normed.view(x.shape)
        return normed if residual is None else (normed, total.view(x.shape))

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x, residual and weight, each only where asked for."""
        total, weight, rstd = ctx.saved_tensors
        grad, grad_total = grads[0], grads[1] if len(grads) > 1 else None
        needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad
        if grad is None:  # only the sum was used
            grads_of_sum = [None if grad_total is None else grad_total.to(dtype) for dtype in ctx.dtypes if dtype]
            return (*grads_of_sum, *(None,) * (4 - len(grads_of_sum)))
        grad_x, grad_weight = launch_backward(
            as_rows(grad),
            None if grad_total is None else as_rows(grad_total),
            total,
            weight,
            rstd,
            needs_input=needs_x or needs_residual,
            needs_weight=needs_weight,
        )
        shaped = None if grad_x is None else grad_x.view(grad.shape)
        return (
            shaped.to(ctx.dtypes[0]) if shaped is not None and needs_x else None,
            shaped.to(ctx.dtypes[1]) if shaped is not None and needs_residual else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
        )
