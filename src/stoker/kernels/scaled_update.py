"""The scales of a product of quantised matrices and the low-rank updates of a layer, in one pass over the result.

    Y[n, m] = s[n] c[m] R[n, m] + α Σ_k P_i[n, k] B[m, k] + X[n, m]        i: the part of the columns that m is in

R is a product of e4m3 matrices without its scales: s are those of the rows of its left, c those of its right. cuBLAS
multiplies faster when it is not asked to scale rows itself (pytorch/pytorch#147971), and updates go over Y anyway.
R is rounded to bf16, and Y again: 2^-9 each, beside the 2^-4 of e4m3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stoker.kernels.triton_support import check_implementation, dot, jit, next_power_of_2, num_programs, tl, triton

MAX_RANK = 128
"""Above it the tiles of P and B do not fit in shared memory beside each other."""

ROWS, COLUMNS, STAGES, PROGRAMS = 32, 128, 3, 4
"""Of a tile; tiles under way in a program; programs a multiprocessor.

A program walks over tiles whose loads are queued two tiles ahead: 92% of copy bandwidth on an H200 (an 8B's layers,
8,192 tokens), where a program a tile comes to 75% in the best of seven tiles, for lack of bytes under way. Tensor
descriptors are no faster.
"""


def scaled_update_reference(
    raw: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    product: Tensor,
    b: Tensor,
    *,
    ends: Sequence[int],
    scaling: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula, in fp32 and rounded once, in the dtype of `product`."""
    total = raw.float() * row_scale
    if column_scale is not None:
        total *= column_scale.view(1, -1)
    begins, rank = [0, *ends[:-1]], b.shape[1]
    for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        part = product[:, index * rank : (index + 1) * rank]
        total[:, begin:end] += scaling * (part.float() @ b[begin:end].float().t())
    return (total if residual is None else total + residual.float()).to(product.dtype)


@jit
def _scaled_update_kernel(  # noqa: PLR0917
    raw_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    column_scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_stride: tl.tensor,
    p_stride: tl.tensor,
    b_row_stride: tl.tensor,
    b_rank_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    first_end: tl.tensor,
    second_end: tl.tensor,
    rank: tl.tensor,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    across = tl.cdiv(num_columns, COLUMNS)
    tiles = across * tl.cdiv(num_rows, ROWS)
    k = tl.arange(0, RANK)
    in_rank = k < rank
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        first = tile % across * COLUMNS
        part = (first >= first_end).to(tl.int32) + (first >= second_end).to(tl.int32)
        column = first + tl.arange(0, COLUMNS)
        row = (tile // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        in_columns, in_rows = column < num_columns, row < num_rows
        mask = in_rows[:, None] & in_columns[None, :]
        here = row[:, None] * num_columns + column[None, :]
        row_scale = tl.load(row_scale_ptr + row, mask=in_rows, other=0.0)
        total = tl.load(raw_ptr + here, mask=mask, other=0.0).to(tl.float32) * row_scale[:, None]
        if HAS_COLUMN_SCALE:
            total *= tl.load(column_scale_ptr + column, mask=in_columns, other=0.0)[None, :]
        p_mask = in_rows[:, None] & in_rank[None, :]
        p = tl.load(p_ptr + row[:, None] * p_stride + part * rank + k[None, :], mask=p_mask, other=0.0)
        b_mask = in_columns[None, :] & in_rank[:, None]
        b = tl.load(b_ptr + column[None, :] * b_row_stride + k[:, None] * b_rank_stride, mask=b_mask, other=0.0)
        total += scaling * dot(p, b)
        if HAS_RESIDUAL:
            residual = residual_ptr + row[:, None] * residual_stride + column[None, :]
            total += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=mask)


def stages_for(rank: int) -> int:
    """Tiles under way in a program: as many as leave room for P and B in 99 KB of shared memory (an Ada GPU's)."""
    return STAGES if rank <= 64 else STAGES - 1


def columns_of(ends: Sequence[int]) -> int:
    """Columns of a tile, such that none lies in two parts; 0 where that would be too few, or parts too many."""
    columns = COLUMNS
    while columns > 16 and any(end % columns for end in ends[:-1]):
        columns //= 2
    return columns if len(ends) <= 3 and not any(end % columns for end in ends[:-1]) else 0


def scaled_update(
    raw: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    product: Tensor,
    b: Tensor,
    *,
    ends: Sequence[int],
    scaling: float = 1.0,
    residual: Tensor | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns Y [N, M] in the dtype of `product`, over `raw` where that has the same.

    raw: [N, M], contiguous; row_scale: fp32 [N, 1]; column_scale: fp32 [M, 1] or None for ones; product: [N, n r] with
    contiguous rows, r columns for each of the n parts of Y's columns that end at `ends`; b: [M, r] with any strides, in
    the dtype of `product`; residual: [N, M] or None. `implementation`: "reference" or "triton" (which leaves ranks
    above MAX_RANK and what `columns_of` refuses to the reference); ValueError for an unknown one.
    """
    rank, columns = b.shape[1], columns_of(ends)
    if not check_implementation(implementation) or not raw.numel() or rank > MAX_RANK or not columns:
        options = {"ends": ends, "scaling": scaling, "residual": residual}
        return scaled_update_reference(raw, row_scale, column_scale, product, b, **options)
    num_rows, num_columns = raw.shape
    out = raw if raw.dtype == product.dtype else torch.empty_like(raw, dtype=product.dtype)
    tiles = triton.cdiv(num_columns, columns) * triton.cdiv(num_rows, ROWS)
    _scaled_update_kernel[(min(tiles, num_programs(raw, per_multiprocessor=PROGRAMS)),)](
        raw,
        row_scale,
        row_scale if column_scale is None else column_scale,
        raw if residual is None else residual,
        product,
        b,
        out,
        num_columns if residual is None else residual.stride(0),
        product.stride(0),
        b.stride(0),
        b.stride(1),
        num_rows,
        num_columns,
        *(*ends, num_columns, num_columns)[:2],
        rank,
        scaling,
        ROWS=ROWS,
        COLUMNS=columns,
        RANK=max(16, next_power_of_2(rank)),
        HAS_COLUMN_SCALE=column_scale is not None,
        HAS_RESIDUAL=residual is not None,
        STAGES=stages_for(rank),
        num_warps=4,
    )
    return out
