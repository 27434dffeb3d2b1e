"""What DoRA does beside LoRA's products: lengths of rows, and a factor for each output with its gradient.

    n_j = |W_j + s B_j A|        c = m / n        Y = c · Z + bias        Z = X Wᵀ + s P Bᵀ
    dZ  = c · dY                 dc = Σ_rows dY · Z

The lengths n are constants in the backward (section 4.3 of the paper), and B A is never formed:

    |W_j + s B_j A|² = |W_j|² + 2 s B_j · (W Aᵀ)_j + s² B_j (A Aᵀ) B_jᵀ

All three terms come from one reading of W, in its own dtype, which is all that lengths cost where Triton runs. A narrow
W is multiplied by A on tensor cores: A is split into two values of the dtype of W, high and low, whose products with it
are exact and are summed in fp32. The factors are fp32 wherever they are multiplied: they stay near 1, where bf16 has
steps of 0.8%.

DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.triton_support import check_implementation, dot, jit, next_power_of_2, tl, triton

MAX_RANK = 64
"""Adapters of a higher rank have their lengths from the reference: A Aᵀ does not fit into a T4's shared memory."""
_CHUNK_BYTES = 16 * 2**20
_BLOCK = 1024
# Of the sums over rows: a tile gives a thread sixteen values, and a program's rows are enough to hide its last sum.
ROWS, COLUMNS, PROGRAM_ROWS = 16, 128, 256
# Rows of W a program takes: fewer where the weight is too small to fill a GPU with such programs.
LENGTH_ROWS, FEW_LENGTH_ROWS, _MANY = 64, 32, 8192


def row_norms(
    weight: Tensor, a: Tensor, b: Tensor, *, scaling: float, slices: Sequence[slice], implementation: str = "reference"
) -> Tensor:
    """Returns the Euclidean norm of each adapted row of W + s B A: `[sum of the slices' sizes]`, fp32, no gradient.

    `weight` `[out, in]`, `a` `[len(slices) * rank, in]`, `b` `[sum of the slices' sizes, rank]`. ValueError for an
    unknown implementation.
    """
    rank, sizes = b.shape[1], [rows.stop - rows.start for rows in slices]
    by_triton = check_implementation(implementation) and rank <= MAX_RANK and weight.dtype != torch.float64
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        parts = list(zip(a.split(rank), b.split(sizes), slices, strict=True))
        if by_triton:
            norms = torch.empty(b.shape[0], dtype=torch.float32, device=weight.device)
            for (a_part, b_part, rows), out in zip(parts, norms.split(sizes), strict=True):
                _launch_lengths(weight[rows], a_part, b_part, scaling, out)
            return norms
        # Not into memory taken before: a C allocator then gives back less, and a merge of many layers holds more.
        squares = [_squares(weight[rows], a_part.float(), b_part.float(), scaling) for a_part, b_part, rows in parts]
        return torch.cat(squares).clamp_min_(0.0).sqrt_()


def _squares(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    quadratic = scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
    num_rows = max(1, _CHUNK_BYTES // (4 * weight.shape[1]))  # a narrow weight is widened chunk by chunk
    linear = []
    for weight_rows, b_rows in zip(weight.split(num_rows), b.split(num_rows), strict=True):
        wide = weight_rows.float()
        linear.append(wide.square().sum(1) + 2 * scaling * ((wide @ a.T) * b_rows).sum(1))
    return quadratic + torch.cat(linear)


@jit
def _lengths_kernel(  # noqa: PLR0917
    weight_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_stride: tl.tensor,
    a_stride: tl.tensor,
    b_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    rank: tl.tensor,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    in_rows, in_rank = row < num_rows, k < rank
    weight = weight_ptr + row.to(tl.int64)[:, None] * weight_stride
    # Squares are summed place by place, and over the places once at the end.
    squares = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    product = tl.zeros((ROWS, RANK), dtype=tl.float32)
    # A Aᵀ, in every program anew: A is there, and a product of its own before would take longer.
    gram = tl.zeros((RANK, RANK), dtype=tl.float32)
    for first in range(0, num_columns, DEPTH):
        column = first + tl.arange(0, DEPTH)
        in_columns = column < num_columns
        w = tl.load(weight + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        a_mask = in_rank[:, None] & in_columns[None, :]
        a = tl.load(a_ptr + k[:, None] * a_stride + column[None, :], mask=a_mask, other=0.0).to(tl.float32)
        wide = w.to(tl.float32)
        squares += wide * wide
        if SPLITS:
            high = a.to(w.dtype)
            low = (a - high.to(tl.float32)).to(w.dtype)
            product += dot(w, tl.trans(high))
            product += dot(w, tl.trans(low))
            gram += dot(high, tl.trans(high))
            gram += dot(high, tl.trans(low))
            gram += dot(low, tl.trans(high))
        else:
            product += dot(wide, tl.trans(a))
            gram += dot(a, tl.trans(a))
    mask = in_rows[:, None] & in_rank[None, :]
    b = tl.load(b_ptr + row[:, None] * b_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    update = 2.0 * scaling * product + scaling * scaling * dot(b, gram)
    total = tl.sum(squares, axis=1) + tl.sum(b * update, axis=1)
    tl.store(out_ptr + row, tl.sqrt(tl.maximum(total, 0.0)), mask=in_rows)


def _launch_lengths(weight: Tensor, a: Tensor, b: Tensor, scaling: float, out: Tensor) -> None:
    num_rows, num_columns = weight.shape
    if not num_rows:
        return
    weight, a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (weight, a, b))
    ranks = max(16, next_power_of_2(b.shape[1]))
    rows = LENGTH_ROWS if num_rows >= _MANY else FEW_LENGTH_ROWS
    _lengths_kernel[(triton.cdiv(num_rows, rows),)](
        weight,
        a,
        b,
        out,
        weight.stride(0),
        a.stride(0),
        b.stride(0),
        num_rows,
        num_columns,
        b.shape[1],
        scaling,
        ROWS=rows,
        DEPTH=depth_for(rows, ranks),
        RANK=ranks,
        SPLITS=weight.dtype in (torch.bfloat16, torch.float16),
        num_warps=4,
    )


def depth_for(rows: int, ranks: int) -> int:
    """Returns the columns that a program reads at a time: 4,096 values of W and of A at most, which hide the memory."""
    return 4096 // max(rows, ranks)


def scaled(
    x: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns `x * scale + bias + residual` in the dtype of x, for x and residual [N, C] and fp32 scale [C].

    `out`: where it is written, x itself too; None: a new tensor. Triton makes one pass and rounds once. ValueError for
    an unknown implementation.
    """
    out = torch.empty_like(x) if out is None else out
    if not check_implementation(implementation) or not x.numel():
        torch.mul(x, scale, out=out)
        if bias is not None:
            out.add_(bias)
        return out if residual is None else out.add_(residual)
    num_rows, num_columns = x.shape
    block = min(_BLOCK, next_power_of_2(num_columns))
    _scale_kernel[(num_rows, triton.cdiv(num_columns, block))](
        x,
        scale,
        scale if bias is None else bias,
        x if residual is None else residual,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        num_columns,
        BLOCK=block,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=4,
    )
    return out


@jit
def _scale_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    scale = tl.load(scale_ptr + column, mask=mask, other=0.0)
    y = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def scaled_backward(
    grad: Tensor, other: Tensor, scale: Tensor, *, out: Tensor | None, implementation: str = "reference"
) -> Tensor:
    """Returns Σ_rows grad · other [C] in the dtype of `scale`, and writes `grad * scale` into `out` if that is given.

    grad, other and out [N, C]; out may be one of the former. Triton makes one pass. ValueError for an unknown
    implementation.
    """
    if not check_implementation(implementation) or not grad.numel():
        total = (grad * other).sum(0, dtype=scale.dtype)
        if out is not None:
            torch.mul(grad, scale, out=out)
        return total
    num_rows, num_columns = grad.shape
    partial = partial_sums(grad, num_columns)
    _sums_kernel[(triton.cdiv(num_columns, COLUMNS), partial.shape[0])](
        grad,
        other,
        scale,
        grad if out is None else out,
        partial,
        grad.stride(0),
        other.stride(0),
        0 if out is None else out.stride(0),
        num_rows,
        num_columns,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        PROGRAM_ROWS=PROGRAM_ROWS,
        WRITES=out is not None,
        num_warps=4,
    )
    return partial.sum(0)


def partial_sums(x: Tensor, num_columns: int) -> Tensor:
    """Returns room for the sums that each program makes of its rows of x, fp32 [programs, num_columns]."""
    return torch.empty(triton.cdiv(x.shape[0], PROGRAM_ROWS), num_columns, dtype=torch.float32, device=x.device)


@jit
def _sums_kernel(  # noqa: PLR0917
    grad_ptr: tl.tensor,
    other_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    grad_stride: tl.tensor,
    other_stride: tl.tensor,
    out_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    WRITES: tl.constexpr,
) -> None:
    # Reads a tile of both before it writes: `out` may be either.
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < num_columns
    scale = tl.load(scale_ptr + column, mask=in_columns, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    begin = tl.program_id(1) * PROGRAM_ROWS
    for first in range(0, PROGRAM_ROWS, ROWS):
        row = (begin + first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < num_rows)[:, None] & in_columns[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(other_ptr + row[:, None] * other_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += grad * other
        if WRITES:
            value = (grad * scale[None, :]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * out_stride + column[None, :], value, mask=mask)
    tl.store(partial_ptr + tl.program_id(1) * num_columns + column, tl.sum(total, axis=0), mask=in_columns)


def scale_columns(x: Tensor, scale: Tensor, *, implementation: str = "reference") -> Tensor:
    """Returns `x * scale`, `x` `[N, out]` in its own dtype and `scale` `[out]` in fp32, multiplied in fp32.

    Gradients of both, that of `scale` summed in its own dtype; no second derivatives. ValueError for an unknown
    implementation.
    """
    return _ScaleColumns.apply(x, scale, implementation)


class _ScaleColumns(torch.autograd.Function):
    """Column-wise product of a narrow matrix and a wide vector without a wide matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, implementation: str) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.implementation = implementation
        return scaled(x, scale, implementation=implementation)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        grad_output = grad_outputs[0] if grad_outputs[0].stride(1) == 1 else grad_outputs[0].contiguous()
        x, scale = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            grad_scale = scaled_backward(grad_output, x, scale, out=grad_x, implementation=ctx.implementation)
            return grad_x, grad_scale, None
        if grad_x is not None:
            scaled(grad_output, scale, out=grad_x, implementation=ctx.implementation)
        return grad_x, None, None
