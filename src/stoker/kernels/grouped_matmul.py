"""Matmuls of rows sorted by expert with each expert's own matrix, with low-rank updates and gathered rows.

For expert e with the sorted rows m in [ends[e-1], ends[e]):

    forward      Y[m] = X[i[m]] W_eᵀ + c_e + s P[m] B_eᵀ        X [R, in], W [E, out, in], P [M, r], B [E, out, r]
    transposed   Y[m] = X[i[m]] W_e + s P[m] A_e                X [R, out], A [E, r, in]

The index i reads rows where they lie instead of making a sorted copy that is top-k times as large; without it rows are
sorted already. Gradients: dX by the transposed product, dW and those of the factors by `grouped_outer`. A product with
a skinny matrix (N of a few columns) is the same kernel with smaller tiles.

Ends stay on the device. A program finds its expert from them, so that nothing waits for the device, whatever the
number of rows each expert gets; the grid is as large as the worst distribution needs, and programs beyond the last tile
end at once. Every output has one program that writes it, in a fixed order of sums: two runs agree bit for bit.

Grouped kernels for mixtures of experts: MegaBlocks (Gale et al. 2022, arXiv:2211.15841).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stoker.kernels.triton_support import TensorDescriptor, check_implementation, dot, jit, next_power_of_2, tl, triton

MAX_RANK = 64
"""Above it the low-rank factors no longer fit beside a tile: the update is then a second product."""


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, warps, and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


WIDE = Tile(128, 256, 64, 8, 4)
MEDIUM = Tile(128, 128, 32, 8, 3)
"""For GPUs before sm_90, some of which have 99 KB of shared memory a program."""
SKINNY = Tile(128, 16, 128, 4, 3)
MAX_SKINNY = 64
"""Columns up to which a product is skinny: all of them in one tile, which is bound by reading rows."""
SMALL = Tile(64, 64, 32, 4, 2)
"""For GPUs before sm_80, whose programs have 64 KB of shared memory, for float32, and for the interpreter."""
GROUP = 8
"""Tiles of rows whose programs run side by side."""
HALVES: bool = True
"""Whether the last rows of an expert may go through half a tile."""
BOXES: bool = True
"""Whether Hopper's tensor descriptors read the tiles."""


def grouped_matmul_reference(  # noqa: PLR0917 - private in effect: the public function names them
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Tensor | None,
    transposed: bool,
    bias: Tensor | None,
    product: Tensor | None,
    factor: Tensor | None,
    scaling: float,
) -> Tensor:
    """The formulas, expert by expert; reads `ends` on the host."""
    taken = x if rows is None else x[rows]
    out = x.new_empty(taken.shape[0], weight.shape[2 if transposed else 1])
    for expert, (start, end) in enumerate(spans(ends)):
        if start == end:
            continue
        matrix = weight[expert] if transposed else weight[expert].t()
        torch.mm(taken[start:end], matrix, out=out[start:end])
        if bias is not None:
            out[start:end] += bias[expert]
        if product is not None and factor is not None:
            low = factor[expert] if transposed else factor[expert].t()
            out[start:end].addmm_(product[start:end], low, alpha=scaling)
    return out


def spans(ends: Tensor) -> list[tuple[int, int]]:
    """Returns the first row and the end of each expert's, read on the host."""
    listed = ends.tolist()
    return list(zip([0, *listed[:-1]], listed, strict=True))


@jit  # pyrefly: ignore[bad-argument-type] - a function of kernels, which returns
def _place(tile: tl.tensor, ends_ptr: tl.tensor, num_experts: tl.tensor, ROWS: tl.constexpr, EXPERTS: tl.constexpr):  # noqa: ANN202
    """(expert, first row, end of its rows) of a tile; expert = num_experts past the last tile."""
    index = tl.arange(0, EXPERTS)
    inside = index < num_experts
    end = tl.load(ends_ptr + index, mask=inside, other=0)
    begin = tl.load(ends_ptr + index - 1, mask=inside & (index > 0), other=0)
    count = tl.where(inside, end - begin, 0)
    tiles_end = tl.cumsum((count + ROWS - 1) // ROWS, axis=0)
    expert = tl.sum((inside & (tiles_end <= tile)).to(tl.int32), axis=0)
    tiles_before = tl.max(tl.where(index < expert, tiles_end, 0), axis=0)
    first = tl.sum(tl.where(index == expert, begin, 0), axis=0) + (tile - tiles_before) * ROWS
    return expert, first, tl.sum(tl.where(index == expert, end, 0), axis=0)


@jit
def _tile_product(  # noqa: PLR0912, PLR0915, PLR0917 - most of it is chosen as it compiles
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    x_box: tl.tensor,
    weight_box: tl.tensor,
    rows_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    expert: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    block: tl.tensor,
    x_stride: tl.tensor,
    p_stride: tl.tensor,
    num_columns: tl.tensor,
    depth: tl.tensor,
    rank: tl.constexpr,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    EVEN: tl.constexpr,
    BOXES: tl.constexpr,
) -> None:
    row = first + tl.arange(0, ROWS)
    in_rows = row < end
    if GATHERED:
        source = tl.load(rows_ptr + row, mask=in_rows, other=0).to(tl.int64)
    else:
        source = tl.where(in_rows, row, first).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < num_columns
    k = tl.arange(0, DEPTH)
    x = x_ptr + source[:, None] * x_stride + k[None, :]
    matrix = weight_ptr + expert.to(tl.int64) * num_columns * depth
    if TRANSPOSED:
        w = matrix + k[:, None].to(tl.int64) * num_columns + column[None, :]
    else:
        w = matrix + column[None, :].to(tl.int64) * depth + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_UPDATE:
        low = tl.arange(0, RANK)
        in_rank = low < rank
        p = p_ptr + row[:, None].to(tl.int64) * p_stride + low[None, :]
        p_tile = tl.load(p, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        factor = b_ptr + expert.to(tl.int64) * num_columns * rank
        if TRANSPOSED:
            factor += low[:, None] * num_columns + column[None, :]
        else:
            factor += column[None, :] * rank + low[:, None]
        f_tile = tl.load(factor, mask=in_rank[:, None] & in_columns[None, :], other=0.0)
        # First, so that the loop adds to it: after the loop, a second tile of sums would not fit in registers.
        total = dot(p_tile, f_tile) * scaling
    for start in range(0, depth, DEPTH):
        left = k < depth - start
        if BOXES and not GATHERED:
            x_tile = x_box.load([first, start])
        elif EVEN:
            x_tile = tl.load(x)
        else:
            x_tile = tl.load(x, mask=left[None, :], other=0.0)
        if BOXES and TRANSPOSED:
            w_tile = weight_box.load([expert * depth + start, block * COLUMNS])
        elif BOXES:
            w_tile = weight_box.load([expert * num_columns + block * COLUMNS, start]).T
        elif EVEN:
            w_tile = tl.load(w)
        else:
            w_tile = tl.load(w, mask=left[:, None] & in_columns[None, :], other=0.0)
        total += dot(x_tile, w_tile)
        x += DEPTH
        w += DEPTH * num_columns if TRANSPOSED else DEPTH
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * num_columns + column, mask=in_columns, other=0.0)
        total += bias.to(tl.float32)[None, :]
    out = out_ptr + row[:, None].to(tl.int64) * num_columns + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@jit
def _matmul_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    x_box: tl.tensor,
    half_box: tl.tensor,
    weight_box: tl.tensor,
    ends_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    p_stride: tl.tensor,
    num_experts: tl.tensor,
    num_columns: tl.tensor,
    depth: tl.tensor,
    rank: tl.constexpr,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    EXPERTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    EVEN: tl.constexpr,
    BOXES: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    # BOXES: descriptors read tiles of the weights, and of rows that are sorted already, in the hardware's own way.
    # They may reach into the next expert's rows, whose results are not stored.
    # Programs that run together share some rows' tiles and some columns of the weights, so that both stay in L2.
    # HALVES: what is left of an expert's rows goes through a tile of half as many, if they fit.
    blocks = tl.num_programs(0)
    program = tl.program_id(1) * blocks + tl.program_id(0)
    group = program // (GROUP * blocks)
    size = tl.minimum(tl.num_programs(1) - group * GROUP, GROUP)
    within = program - group * (GROUP * blocks)
    tile, block = group * GROUP + within % size, within // size
    expert, first, end = _place(tile, ends_ptr, num_experts, ROWS, EXPERTS)
    if expert < num_experts:
        if HALVES:
            is_short = end - first <= ROWS // 2
        else:
            is_short: tl.constexpr = False
        if is_short:
            _tile_product(
                x_ptr,
                weight_ptr,
                half_box,
                weight_box,
                rows_ptr,
                bias_ptr,
                p_ptr,
                b_ptr,
                out_ptr,
                expert,
                first,
                end,
                block,
                x_stride,
                p_stride,
                num_columns,
                depth,
                rank,
                scaling,
                ROWS // 2,
                COLUMNS,
                DEPTH,
                RANK,
                TRANSPOSED,
                GATHERED,
                HAS_BIAS,
                HAS_UPDATE,
                EVEN,
                BOXES,
            )
        else:
            _tile_product(
                x_ptr,
                weight_ptr,
                x_box,
                weight_box,
                rows_ptr,
                bias_ptr,
                p_ptr,
                b_ptr,
                out_ptr,
                expert,
                first,
                end,
                block,
                x_stride,
                p_stride,
                num_columns,
                depth,
                rank,
                scaling,
                ROWS,
                COLUMNS,
                DEPTH,
                RANK,
                TRANSPOSED,
                GATHERED,
                HAS_BIAS,
                HAS_UPDATE,
                EVEN,
                BOXES,
            )


def tile_for(x: Tensor, num_columns: int) -> Tile:
    """Returns the tile for products of `x` with so many columns on its device."""
    if not x.is_cuda or x.dtype is torch.float32 or torch.cuda.get_device_capability(x.device)[0] < 8:
        return SMALL if num_columns > 32 else Tile(64, max(16, next_power_of_2(num_columns)), 32, 4, 2)
    is_hopper = torch.cuda.get_device_capability(x.device)[0] >= 9
    if num_columns <= MAX_SKINNY:
        depth = SKINNY.depth if is_hopper else SKINNY.depth // 2
        return SKINNY._replace(columns=max(16, next_power_of_2(num_columns)), depth=depth)
    return WIDE if is_hopper else MEDIUM


def _has_boxes(device: torch.device) -> bool:
    """Whether Triton and the device have tensor descriptors (Hopper)."""
    return TensorDescriptor is not None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _boxes(x: Tensor, weight: Tensor, tile: Tile, *, transposed: bool) -> tuple[Any, Any, Any] | None:
    """Descriptors of tiles and half tiles of `x`, and of `weight` [E out, in]; None where device or layout has none."""
    if not _has_boxes(x.device):
        return None
    flat = weight.flatten(0, 1)
    pitches = (x.stride(0), flat.stride(0))
    aligned = all(16 % tensor.element_size() == 0 and tensor.data_ptr() % 16 == 0 for tensor in (x, flat))
    if not aligned or any(pitch * x.element_size() % 16 for pitch in pitches):
        return None
    if weight.shape[1 if transposed else 2] % tile.depth:  # a box would reach into the next expert's depth
        return None
    shape = [tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]
    return (
        TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [tile.rows, tile.depth]),
        TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [tile.rows // 2, tile.depth]),
        TensorDescriptor(flat, list(flat.shape), [flat.stride(0), 1], shape),
    )


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    *,
    rows: Tensor | None = None,
    transposed: bool = False,
    bias: Tensor | None = None,
    product: Tensor | None = None,
    factor: Tensor | None = None,
    scaling: float = 1.0,
    implementation: str = "reference",
) -> Tensor:
    """Returns each sorted row times its expert's matrix: [M, out], or [M, in] when `transposed`.

    x: [R, in] ([R, out] when transposed), rows contiguous; weight: contiguous [E, out, in]; ends: int32 [E], where each
    expert's rows end, the last one M; rows: int32 [M], the row of `x` for each sorted row (None: the same); bias:
    [E, out]. With `product` [M, r] and `factor` [E, out, r] ([E, r, in] when transposed) adds `scaling` times their
    product. All of one dtype; no gradients. `implementation`: "reference" or "triton"; ValueError for another.
    """
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    if not check_implementation(implementation) or not num_rows:
        return grouped_matmul_reference(x, weight, ends, rows, transposed, bias, product, factor, scaling)
    num_experts, depth = weight.shape[0], weight.shape[1 if transposed else 2]
    num_columns = weight.shape[2 if transposed else 1]
    rank = 0 if product is None else product.shape[1]
    if rank > MAX_RANK:
        raise ValueError(f"grouped_matmul: updates of rank {rank} are above {MAX_RANK}")
    tile = tile_for(x, num_columns)
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    tiles, blocks = triton.cdiv(num_rows, tile.rows) + num_experts - 1, triton.cdiv(num_columns, tile.columns)
    boxes = _boxes(x, weight, tile, transposed=transposed) if tile is WIDE and BOXES else None
    _matmul_kernel[(blocks, tiles)](
        x,
        weight,
        ends if boxes is None else boxes[0],
        ends if boxes is None else boxes[1],
        ends if boxes is None else boxes[2],
        ends,
        ends if rows is None else rows,
        x if bias is None else bias,
        x if product is None else product,
        x if factor is None else factor,
        out,
        x.stride(0),
        0 if product is None else product.stride(0),
        num_experts,
        num_columns,
        depth,
        rank,
        scaling,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        RANK=max(16, next_power_of_2(rank)),
        EXPERTS=max(16, next_power_of_2(num_experts)),
        TRANSPOSED=transposed,
        GATHERED=rows is not None,
        HAS_BIAS=bias is not None,
        HAS_UPDATE=product is not None,
        EVEN=depth % tile.depth == 0 and num_columns % tile.columns == 0,
        BOXES=boxes is not None,
        HALVES=HALVES and num_columns > MAX_SKINNY,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
