"""Outer products over the rows of each expert: gradients of experts' weights and of their low-rank factors.

    O_e = s Σ_m L[i[m]]ᵀ R[j[m]]        m in expert e's sorted rows; L [., K₁], R [., K₂], O [E, K₁, K₂]

The indices read rows where they lie, as in `grouped_matmul`. A program sums one tile of one expert over its rows in
order: two runs agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.kernels.grouped_matmul import SMALL, Tile, spans
from stoker.kernels.triton_support import check_implementation, dot, jit, next_power_of_2, tl, triton

NARROW = Tile(64, 128, 64, 4, 3)
WIDE = Tile(128, 128, 64, 8, 3)


def grouped_outer_reference(  # noqa: PLR0917 - private in effect: the public function names them
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    left_rows: Tensor | None,
    right_rows: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """The formula, expert by expert; reads `ends` on the host."""
    left = left if left_rows is None else left[left_rows]
    right = right if right_rows is None else right[right_rows]
    out = torch.zeros(ends.shape[0], left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    for expert, (start, end) in enumerate(spans(ends)):
        if start < end:
            out[expert] = (left[start:end].t() @ right[start:end]).to(dtype) * scaling
    return out


@jit
def _outer_kernel(  # noqa: PLR0917
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    left_rows_ptr: tl.tensor,
    right_rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    num_left: tl.tensor,
    num_right: tl.tensor,
    scaling: tl.tensor,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    LEFT_GATHERED: tl.constexpr,
    RIGHT_GATHERED: tl.constexpr,
) -> None:
    expert = tl.program_id(2)
    end = tl.load(ends_ptr + expert)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    l_column = tl.program_id(1) * LEFT + tl.arange(0, LEFT)
    r_column = tl.program_id(0) * RIGHT + tl.arange(0, RIGHT)
    in_left, in_right = l_column < num_left, r_column < num_right
    total = tl.zeros((LEFT, RIGHT), dtype=tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        in_rows = row < end
        l_row, r_row = row, row
        if LEFT_GATHERED:
            l_row = tl.load(left_rows_ptr + row, mask=in_rows, other=0)
        if RIGHT_GATHERED:
            r_row = tl.load(right_rows_ptr + row, mask=in_rows, other=0)
        left = left_ptr + l_row[None, :].to(tl.int64) * left_stride + l_column[:, None]
        right = right_ptr + r_row[:, None].to(tl.int64) * right_stride + r_column[None, :]
        l_tile = tl.load(left, mask=in_rows[None, :] & in_left[:, None], other=0.0)
        r_tile = tl.load(right, mask=in_rows[:, None] & in_right[None, :], other=0.0)
        total += dot(l_tile, r_tile)
    out = out_ptr + expert.to(tl.int64) * num_left * num_right
    out += l_column[:, None].to(tl.int64) * num_right + r_column[None, :]
    tl.store(out, (total * scaling).to(out_ptr.dtype.element_ty), mask=in_left[:, None] & in_right[None, :])


def grouped_outer(
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    *,
    left_rows: Tensor | None = None,
    right_rows: Tensor | None = None,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns `scaling * left.T @ right` over each expert's rows, [E, K1, K2]; zeros where it has none.

    left: [., K1] and right: [., K2], of one dtype and with contiguous rows; `left_rows`, `right_rows`: int32 [M], the
    row of each for a sorted row (None: the same); `dtype` of the result (None: float32, or wider inputs'). `ends` and
    `implementation` as for `grouped_matmul`.
    """
    dtype = dtype or torch.promote_types(left.dtype, torch.float32)
    if not check_implementation(implementation) or not left.shape[0]:
        return grouped_outer_reference(left, right, ends, left_rows, right_rows, scaling, dtype)
    num_left, num_right = left.shape[1], right.shape[1]
    small = not left.is_cuda or left.dtype is torch.float32 or torch.cuda.get_device_capability(left.device)[0] < 8
    tile = SMALL if small else WIDE if num_left > 64 and num_right > 64 else NARROW
    width = max(16, min(tile.columns, next_power_of_2(num_right)))
    height = max(16, min(tile.rows if num_right > 64 else tile.columns, next_power_of_2(num_left)))
    out = torch.empty((ends.shape[0], num_left, num_right), dtype=dtype, device=left.device)
    _outer_kernel[(triton.cdiv(num_right, width), triton.cdiv(num_left, height), ends.shape[0])](
        left,
        right,
        ends,
        ends if left_rows is None else left_rows,
        ends if right_rows is None else right_rows,
        out,
        left.stride(0),
        right.stride(0),
        num_left,
        num_right,
        scaling,
        LEFT=height,
        RIGHT=width,
        ROWS=tile.depth,
        LEFT_GATHERED=left_rows is not None,
        RIGHT_GATHERED=right_rows is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
