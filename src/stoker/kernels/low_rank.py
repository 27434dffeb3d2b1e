"""The low-rank products of a linear layer's backward in one read of its output's gradient.

    dP_i = s dY_i B_i        dB_i = s dY_iᵀ P_i        for the parts i of dY's columns, P_i = X A_iᵀ

and, where X = diag(f) Z diag(w) is a norm's output, diag(f) dP, from which dA = ((diag(f) dP)ᵀ Z) diag(w).

A matmul library reads dY once for each product, and splits so thin a result unevenly over the device. Here a program
takes a block of columns and a run of rows: it keeps its share of dB in registers and writes its share of dP. The shares
are then summed in a fixed order, in fp32, so that two runs agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stoker.kernels.triton_support import check_implementation, dot, jit, jit_unspecialized, next_power_of_2, tl, triton

MAX_RANK = 32
"""Above it the shares of dB no longer fit in registers beside a tile, nor the tiles in a T4's shared memory."""

MAX_PARTS = 3
COLUMNS = 128
ROWS = 64
ROWS_A_PROGRAM, MANY_PROGRAMS = 512, 256
"""Where twice as many rows still leave so many programs, two for each of an H200's multiprocessors, they take those:
7% faster, and half the shares of dB."""
SCALED_COLUMNS = 2048
"""Of a program that multiplies columns by factors."""
ELEMENTS, SHARES = 256, 16
"""Of a program that sums shares: eight elements a thread, and shares that it reads at a time."""


Factored = tuple[Tensor, Tensor]
"""A factor of each row [N], fp32, and memory [N, n r] for dP times it."""


def grad_pair_reference(
    grad: Tensor,
    product: Tensor,
    b: Tensor,
    *,
    slices: Sequence[slice],
    scaling: float,
    factored: Factored | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (dP [N, n r] like `product`, dB like `b`) by the formulas."""
    rank, start = b.shape[1], 0
    grad_p, grad_b = torch.empty_like(product), torch.empty_like(b)
    for index, columns in enumerate(slices):
        rows, ranks = slice(start, start + columns.stop - columns.start), slice(index * rank, (index + 1) * rank)
        torch.mm(grad[:, columns], b[rows], out=grad_p[:, ranks])
        torch.mm(grad[:, columns].t(), product[:, ranks], out=grad_b[rows])
        start = rows.stop
    grad_p.mul_(scaling)
    if factored is not None:
        factor, out = factored
        out.copy_(grad_p * factor[:, None])
    return grad_p, grad_b.mul_(scaling)


def grad_pair(
    grad: Tensor,
    product: Tensor,
    b: Tensor,
    *,
    slices: Sequence[slice],
    scaling: float,
    factored: Factored | None = None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Returns (dP [N, n r] in the dtype of `product`, dB like `b`, in fp32 from Triton).

    grad: [N, out] with contiguous rows; product: [N, n r], x Aᵀ of the n parts; b: [sum of the slices' sizes, r] in the
    dtype of `grad`. `factored` takes dP times a factor of each row as well. `implementation`: "reference" or "triton"
    (which leaves the rest of `takes` to the reference); ValueError for an unknown one.
    """
    options: dict[str, Any] = {"slices": slices, "scaling": scaling, "factored": factored}
    if check_implementation(implementation) and takes(grad, b, slices):
        return _launch(grad, product.contiguous(), b.contiguous(), **options)
    return grad_pair_reference(grad, product, b, **options)


def takes(grad: Tensor, b: Tensor, slices: Sequence[slice]) -> bool:
    """Whether the kernel runs this: up to three parts, side by side over all columns, no rank above MAX_RANK."""
    ends = [0, *(part.stop for part in slices)]
    side_by_side = [part.start for part in slices] == ends[:-1] and ends[-1] == grad.shape[1]
    return (
        0 < len(slices) <= MAX_PARTS
        and side_by_side
        and b.shape[1] <= MAX_RANK
        and grad.stride(1) == 1
        and grad.numel() > 0
        and _columns(slices) >= 16
    )


def _columns(slices: Sequence[slice]) -> int:
    """Columns of a program, which must not reach into another part: a power of two."""
    inner = [part.stop for part in slices[:-1]]
    return math.gcd(COLUMNS, *inner)


@jit
def _grad_pair_kernel(  # noqa: PLR0917
    grad_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    part_p_ptr: tl.tensor,
    part_b_ptr: tl.tensor,
    grad_stride: tl.tensor,
    p_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    first_end: tl.tensor,
    second_end: tl.tensor,
    rank: tl.constexpr,
    rows_a_program: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    block, split = tl.program_id(0), tl.program_id(1)
    first = block * COLUMNS
    part = (first >= first_end).to(tl.int32) + (first >= second_end).to(tl.int32)
    column = first + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    in_columns, in_rank = column < num_columns, k < rank
    b = tl.load(b_ptr + column[:, None] * rank + k[None, :], mask=in_columns[:, None] & in_rank[None, :], other=0.0)
    share_b = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    for start in range(split * rows_a_program, tl.minimum(num_rows, (split + 1) * rows_a_program), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        in_rows = row < num_rows
        here = in_rows[:, None] & in_rank[None, :]
        p = tl.load(p_ptr + row[:, None] * p_stride + part * rank + k[None, :], mask=here, other=0.0)
        mask = in_rows[:, None] & in_columns[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0)
        share_b += dot(tl.trans(grad), p)
        share_p = dot(grad, b).to(part_p_ptr.dtype.element_ty)
        out = part_p_ptr + (block.to(tl.int64) * num_rows + row[:, None]) * rank + k[None, :]
        tl.store(out, share_p, mask=here)
    out = part_b_ptr + (split.to(tl.int64) * num_columns + column[:, None]) * rank + k[None, :]
    tl.store(out, share_b, mask=in_columns[:, None] & in_rank[None, :])


@jit
def _add_shares(  # noqa: PLR0917
    share_ptr: tl.tensor,
    out_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    factored_ptr: tl.tensor,
    block: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    out_stride: tl.tensor,
    first_column: tl.tensor,
    scaling: tl.tensor,
    ELEMENTS: tl.constexpr,
    SHARES: tl.constexpr,
    FACTORED: tl.constexpr,
) -> None:
    # A thread sums its own elements, and SHARES loads of each are under way at once, which hides the memory's latency.
    element = block.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    total = tl.zeros((ELEMENTS,), dtype=tl.float32)
    for start in range(begin, end, SHARES):
        for index in tl.static_range(SHARES):
            share = start + index
            mask = element < tl.where(share < end, size, 0)
            values = tl.load(share_ptr + tl.cast(share, tl.int64) * size + element, mask=mask, other=0.0)
            total += values.to(tl.float32)
    row = element // width
    place = row * out_stride + first_column + element % width
    total *= scaling
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)
    if FACTORED:
        total *= tl.load(factor_ptr + row, mask=inside, other=0.0)
        tl.store(factored_ptr + place, total.to(factored_ptr.dtype.element_ty), mask=inside)


@jit_unspecialized("first_end", "second_end", "num_shares_p", "num_shares_b", "blocks_p")
def _sum_shares_kernel(  # noqa: PLR0917
    share_p_ptr: tl.tensor,
    share_b_ptr: tl.tensor,
    grad_p_ptr: tl.tensor,
    grad_b_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    factored_ptr: tl.tensor,
    size_p: tl.tensor,
    size_b: tl.tensor,
    rank: tl.tensor,
    p_stride: tl.tensor,
    first_end: tl.tensor,
    second_end: tl.tensor,
    num_shares_p: tl.tensor,
    num_shares_b: tl.tensor,
    num_parts: tl.tensor,
    blocks_p: tl.tensor,
    scaling: tl.tensor,
    ELEMENTS: tl.constexpr,
    SHARES: tl.constexpr,
    FACTORED: tl.constexpr,
) -> None:
    # The first programs sum dP, part by part, the others dB: two launches of a few microseconds each would wait longer
    # than they work.
    program = tl.program_id(0)
    part = program // blocks_p
    if part < num_parts:
        begin = tl.where(part == 0, 0, tl.where(part == 1, first_end, second_end))
        end = tl.where(part == 0, first_end, tl.where(part == 1, second_end, num_shares_p))
        _add_shares(
            share_p_ptr,
            grad_p_ptr,
            factor_ptr,
            factored_ptr,
            program - part * blocks_p,
            begin,
            end,
            size_p,
            rank,
            p_stride,
            part * rank,
            scaling,
            ELEMENTS,
            SHARES,
            FACTORED,
        )
    else:
        _add_shares(
            share_b_ptr,
            grad_b_ptr,
            factor_ptr,
            factored_ptr,
            program - num_parts * blocks_p,
            0,
            num_shares_b,
            size_b,
            rank,
            rank,
            0,
            scaling,
            ELEMENTS,
            SHARES,
            FACTORED=False,
        )


def sum_shares(
    share_p: Tensor, share_b: Tensor, ends: Sequence[int], *, scaling: float = 1.0, factored: Factored | None = None
) -> tuple[Tensor, Tensor]:
    """Returns `scaling` times (dP [N, n r] in the dtype of its shares, dB [M, r] in fp32), summed in fp32.

    share_p: [S, N, r], whose first dimension falls into up to three runs that end at `ends`, the last of them S; the
    runs' sums lie side by side. share_b: [T, M, r]. Both contiguous; one launch. `factored` takes dP times a factor of
    each row as well.
    """
    num_shares, num_rows, rank = share_p.shape
    grad_p = torch.empty((num_rows, len(ends) * rank), dtype=share_p.dtype, device=share_p.device)
    grad_b = torch.empty(share_b.shape[1:], dtype=torch.float32, device=share_b.device)
    blocks_p, blocks_b = triton.cdiv(num_rows * rank, ELEMENTS), triton.cdiv(grad_b.numel(), ELEMENTS)
    _sum_shares_kernel[(len(ends) * blocks_p + blocks_b,)](
        share_p,
        share_b,
        grad_p,
        grad_b,
        *((grad_b, grad_p) if factored is None else factored),
        num_rows * rank,
        grad_b.numel(),
        rank,
        grad_p.stride(0),
        *(*ends, num_shares, num_shares)[:2],
        num_shares,
        share_b.shape[0],
        len(ends),
        blocks_p,
        scaling,
        ELEMENTS=ELEMENTS,
        SHARES=SHARES,
        FACTORED=factored is not None,
        num_warps=1,
    )
    return grad_p, grad_b


def _launch(
    grad: Tensor, product: Tensor, b: Tensor, *, slices: Sequence[slice], scaling: float, factored: Factored | None
) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = grad.shape
    rank, columns = b.shape[1], _columns(slices)
    blocks = triton.cdiv(num_columns, columns)
    is_large = blocks * triton.cdiv(num_rows, 2 * ROWS_A_PROGRAM) >= MANY_PROGRAMS
    rows_a_program = (2 if is_large else 1) * ROWS_A_PROGRAM
    splits = triton.cdiv(num_rows, rows_a_program)
    share_p = torch.empty((blocks, num_rows, rank), dtype=product.dtype, device=grad.device)
    share_b = torch.empty((splits, num_columns, rank), dtype=torch.float32, device=grad.device)
    ends = [part.stop for part in slices]
    _grad_pair_kernel[(blocks, splits)](
        grad,
        product,
        b,
        share_p,
        share_b,
        grad.stride(0),
        product.stride(0),
        num_rows,
        num_columns,
        *(*ends, num_columns, num_columns)[:2],
        rank,
        rows_a_program,
        ROWS=ROWS,
        COLUMNS=columns,
        RANK=max(16, next_power_of_2(rank)),
        num_warps=4,
    )
    runs = [triton.cdiv(end, columns) for end in ends]
    return sum_shares(share_p, share_b, runs, scaling=scaling, factored=factored)


@jit
def _scale_columns_kernel(
    x_ptr: tl.tensor, factor_ptr: tl.tensor, out_ptr: tl.tensor, num_columns: tl.tensor, BLOCK: tl.constexpr
) -> None:
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * num_columns + column
    mask = column < num_columns
    factor = tl.load(factor_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) * factor, mask=mask)


def scale_columns(x: Tensor, factor: Tensor, *, implementation: str) -> Tensor:
    """Returns `x` [N, D] times the `factor` [D] of each column, in fp32 or wider.

    ValueError for an unknown implementation.
    """
    if not check_implementation(implementation) or not x.numel():
        return x * factor.float()
    x, (num_rows, num_columns) = x.contiguous(), x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    block = min(SCALED_COLUMNS, next_power_of_2(num_columns))
    _scale_columns_kernel[(num_rows, triton.cdiv(num_columns, block))](
        x, factor.contiguous(), out, num_columns, BLOCK=block, num_warps=4
    )
    return out


@jit
def _add_update_kernel(  # noqa: PLR0917
    y_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    y_stride: tl.tensor,
    residual_stride: tl.tensor,
    p_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    rank: tl.constexpr,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_Y: tl.constexpr,
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, RANK)
    in_columns, in_rows, in_rank = column < num_columns, row < num_rows, k < rank
    mask = in_rows[:, None] & in_columns[None, :]
    y = y_ptr + row[:, None] * y_stride + column[None, :]
    residual = residual_ptr + row[:, None] * residual_stride + column[None, :]
    total = tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    if HAS_Y:
        total += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    here = in_rows[:, None] & in_rank[None, :]
    p = tl.load(p_ptr + row[:, None] * p_stride + k[None, :], mask=here, other=0.0)
    there = in_columns[None, :] & in_rank[:, None]
    b = tl.load(b_ptr + column[None, :] * rank + k[:, None], mask=there, other=0.0)
    total += scaling * dot(p, b)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=mask)


def add_update(
    y: Tensor | None, residual: Tensor, product: Tensor, b: Tensor, *, scaling: float, implementation: str = "reference"
) -> Tensor:
    """Returns `y + residual + scaling * product @ b.T`, over `y` [N, out] (None: 0, and a new tensor).

    residual: [N, out]; product: [N, r]; b: [out, r]. Triton makes one pass and rounds once. ValueError for an unknown
    implementation.
    """
    if not check_implementation(implementation) or not residual.numel() or b.shape[1] > MAX_RANK:
        if y is None:
            return torch.addmm(residual, product, b.t(), alpha=scaling)
        return y.addmm_(product, b.t(), alpha=scaling).add_(residual)
    num_rows, num_columns = residual.shape
    b = b.contiguous()
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) if y is None else y
    _add_update_kernel[(triton.cdiv(num_columns, COLUMNS), triton.cdiv(num_rows, ROWS))](
        out,
        residual,
        product,
        b,
        out.stride(0),
        residual.stride(0),
        product.stride(0),
        num_rows,
        num_columns,
        b.shape[1],
        scaling,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        RANK=max(16, next_power_of_2(b.shape[1])),
        HAS_Y=y is not None,
        num_warps=4,
    )
    return out
