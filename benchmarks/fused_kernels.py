"""Matrix products for Hopper with what a layer does around them in their epilogues, by Triton; an experiment.

With rows X [N, in], a frozen W [out, in], adapters A [n r, in] and B [out, r], P = X Aᵀ and dP = dY B scaled before:

    linear                  Y = X Wᵀ + P_i Bᵀ (+ residual)                     i: the part of the columns
    linear_transposed       dX = dY W + dP A
    gated_linear            [G, U] = X Wᵀ + [P_g B_gᵀ, P_u B_uᵀ],  act = silu(G) · U, both written
    gated_linear_backward   dact = dY W + dP A stays in registers;  dG = dact · U · silu'(G),  dU = dact · silu(G), act

A persistent grid walks over tiles of the output; tensor descriptors (TMA) read and write them, and the tensor cores'
results stay where they are: halves of a tile's columns lie in the same threads' registers, so that gate and up are
halves of one tile, and an epilogue goes through a tile piece by piece without moving anything. Two ways to hide it:

    one wide tile a multiprocessor, its loop merged with that over tiles: the next tile's reads run during the epilogue
    two tiles of half the width: while one program is in its epilogue, the other multiplies

bf16, sums in fp32, each output rounded once. `benchmarks/fused_products.py` measures them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stoker.kernels.triton_support import TensorDescriptor, jit, jit_unspecialized, next_power_of_2, tl, triton

MAX_PARTS = 3


class Tile(NamedTuple):
    """How a product runs.

    `pieces`: runs of columns (of each of gate and up) that the epilogue takes one by one, of 1, 2 or 4; `programs`: for
    each multiprocessor; `merged`: whether the loops over tiles and over depth are one; `group`: tiles of rows whose
    programs run side by side and share tiles of the weight in L2; `chunk`: of the updates' inner dimension at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    pieces: int
    programs: int
    merged: bool
    group: int = 8
    chunk: int = 64


@jit
def _add_dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    # The interpreter multiplies the bits of bfloat16 as if they were integers; widened they are exact.
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


_WIDEN: Any = None if triton is None else tl.constexpr(bool(triton.knobs.runtime.interpret))


@jit
def _place(tile: tl.tensor, tiles_down: tl.tensor, tiles_across: tl.tensor, group_size: tl.tensor):
    """(row, column) of a tile among tiles: groups of rows, each column by column."""
    per_group = group_size * tiles_across
    first = tile // per_group * group_size
    size = tl.minimum(tiles_down - first, group_size)
    within = tile % per_group
    return first + within % size, within // size


@jit
def _halves(x: tl.tensor):
    """(left, right) halves of the columns, each thread's of what it has."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return x.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()


@jit
def _put(  # noqa: PLR0917
    total: tl.tensor,
    read_box: tl.tensor,
    out_box: tl.tensor,
    act_box: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    num_columns: tl.tensor,
    MODE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """Writes a piece of the output, or of what the activation's backward makes of it."""
    if MODE == "gated_backward":
        gate = read_box.load([row, column]).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        out_box.store([row, num_columns + column], (total * value).to(tl.bfloat16))
        up = read_box.load([row, num_columns + column]).to(tl.float32)
        act_box.store([row, column], (value * up).to(tl.bfloat16))
        out_box.store([row, column], (total * up * (sigmoid + value * (1 - sigmoid))).to(tl.bfloat16))
    else:
        if HAS_RESIDUAL:
            total += read_box.load([row, column]).to(tl.float32)
        out_box.store([row, column], total.to(tl.bfloat16))


@jit
def _put_gated(  # noqa: PLR0917
    gate: tl.tensor,
    up: tl.tensor,
    out_box: tl.tensor,
    act_box: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    num_columns: tl.tensor,
) -> None:
    """Writes a piece of gate, of up and of their activation, which is that of the rounded values."""
    gate = gate.to(tl.bfloat16)
    out_box.store([row, column], gate)
    up = up.to(tl.bfloat16)
    out_box.store([row, num_columns + column], up)
    wide = gate.to(tl.float32)
    act_box.store([row, column], (wide * tl.sigmoid(wide) * up.to(tl.float32)).to(tl.bfloat16))


@jit
def _prefetch(  # noqa: PLR0917
    read_ptr: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    num_rows: tl.tensor,
    read_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Has L2 fetch a tile that the epilogue will read: a line of 128 bytes is 64 columns."""
    rows = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
    columns = column + tl.arange(0, COLUMNS // 64) * 64
    line = (read_ptr + rows[:, None] * read_stride + columns[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
    )


@jit_unspecialized("first_end", "second_end", "group_size")
def _product_kernel(  # noqa: PLR0912, PLR0915, PLR0917 - one loop, its ends chosen as it compiles
    x_box: tl.tensor,
    w_box: tl.tensor,
    p_box: tl.tensor,
    f_box: tl.tensor,
    read_box: tl.tensor,
    out_box: tl.tensor,
    act_box: tl.tensor,
    read_ptr: tl.tensor,
    read_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    depth: tl.tensor,
    first_end: tl.tensor,
    second_end: tl.tensor,
    rank: tl.tensor,
    group_size: tl.tensor,
    MODE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:
    # Columns of gate beside as many of up are one tile.
    STEP: tl.constexpr = COLUMNS // 2 if MODE == "gated" else COLUMNS
    tiles_down, tiles_across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, STEP)
    steps = tl.cdiv(depth, DEPTH)
    tl.assume(steps > 0)  # or a second loop would be compiled, and its buffers too
    first = tl.program_id(0)
    done = first - PROGRAMS
    for tile in tl.range(first, tiles_down * tiles_across, PROGRAMS, flatten=MERGED):
        down, across = _place(tile, tiles_down, tiles_across, group_size)
        row, column = down * ROWS, across * STEP
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(steps):
            x = x_box.load([row, k * DEPTH])
            if MODE == "gated":
                w = w_box.load([0, column, k * DEPTH]).reshape(COLUMNS, DEPTH).T
            elif TRANSPOSED:
                w = w_box.load([k * DEPTH, column])
            else:
                w = w_box.load([column, k * DEPTH]).T
            total = _add_dot(x, w, total)
            if PREFETCH:  # noqa: SIM102 - known as it compiles
                if k == tl.maximum(steps - 16, 0):
                    _prefetch(read_ptr, row, column, num_rows, read_stride, ROWS, COLUMNS)
                    if MODE == "gated_backward":
                        _prefetch(read_ptr, row, num_columns + column, num_rows, read_stride, ROWS, COLUMNS)
        # Where loops are merged, row and column are those of reads that run ahead: computed again, they need not wait.
        done += PROGRAMS
        down, across = _place(done, tiles_down, tiles_across, group_size)
        row, column = down * ROWS, across * STEP
        if HAS_UPDATE:
            part = (column >= first_end).to(tl.int32) + (column >= second_end).to(tl.int32)
            for low in tl.static_range(0, RANK, CHUNK):
                if MODE == "gated":
                    p = p_box.load([row, low])
                    f = f_box.load([0, column, low]).reshape(COLUMNS, CHUNK).T
                elif TRANSPOSED:
                    p = p_box.load([row, low])
                    f = f_box.load([low, column])
                else:
                    p = p_box.load([row, part * rank + low])
                    f = f_box.load([column, low]).T
                total = _add_dot(p, f, total)
        QUARTER: tl.constexpr = STEP // 4
        if MODE == "gated":
            gate, up = _halves(total)
            if PIECES == 1:
                _put_gated(gate, up, out_box, act_box, row, column, num_columns)
            else:
                gate_0, gate_2 = _halves(gate)
                up_0, up_2 = _halves(up)
                if PIECES == 2:
                    _put_gated(gate_0, up_0, out_box, act_box, row, column, num_columns)
                    _put_gated(gate_2, up_2, out_box, act_box, row, column + 2 * QUARTER, num_columns)
                else:
                    gate_0, gate_1 = _halves(gate_0)
                    up_0, up_1 = _halves(up_0)
                    gate_2, gate_3 = _halves(gate_2)
                    up_2, up_3 = _halves(up_2)
                    _put_gated(gate_0, up_0, out_box, act_box, row, column, num_columns)
                    _put_gated(gate_1, up_1, out_box, act_box, row, column + QUARTER, num_columns)
                    _put_gated(gate_2, up_2, out_box, act_box, row, column + 2 * QUARTER, num_columns)
                    _put_gated(gate_3, up_3, out_box, act_box, row, column + 3 * QUARTER, num_columns)
        elif PIECES == 1:
            _put(total, read_box, out_box, act_box, row, column, num_columns, MODE, HAS_RESIDUAL)
        else:
            piece_0, piece_2 = _halves(total)
            if PIECES == 2:
                _put(piece_0, read_box, out_box, act_box, row, column, num_columns, MODE, HAS_RESIDUAL)
                _put(piece_2, read_box, out_box, act_box, row, column + 2 * QUARTER, num_columns, MODE, HAS_RESIDUAL)
            else:
                piece_0, piece_1 = _halves(piece_0)
                piece_2, piece_3 = _halves(piece_2)
                _put(piece_0, read_box, out_box, act_box, row, column, num_columns, MODE, HAS_RESIDUAL)
                _put(piece_1, read_box, out_box, act_box, row, column + QUARTER, num_columns, MODE, HAS_RESIDUAL)
                _put(piece_2, read_box, out_box, act_box, row, column + 2 * QUARTER, num_columns, MODE, HAS_RESIDUAL)
                _put(piece_3, read_box, out_box, act_box, row, column + 3 * QUARTER, num_columns, MODE, HAS_RESIDUAL)


def _box(x: Tensor, *sizes: int) -> Any:
    """Triton's view of `x` in boxes of `sizes`; ValueError where the hardware has none such."""
    pitches = [stride * x.element_size() for stride in x.stride()[:-1]]
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(pitch % 16 for pitch in pitches):
        raise ValueError(f"a tensor of shape {tuple(x.shape)}, strides {x.stride()} is not laid out in 16 bytes")
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(sizes))


def _programs(x: Tensor, tile: Tile) -> int:
    if not x.is_cuda:
        return 2  # the interpreter's, one after the other; each still walks over tiles
    return tile.programs * torch.cuda.get_device_properties(x.device).multi_processor_count


def _launch(  # noqa: PLR0917 - private
    mode: str,
    x: Tensor,
    weight: Tensor,
    product: Tensor | None,
    factor: Tensor | None,
    read: Tensor | None,
    out: Tensor,
    activated: Tensor | None,
    tile: Tile,
    *,
    num_columns: int,
    transposed: bool = False,
    ends: tuple[int, ...] = (),
    rank: int = 0,
    prefetch: bool = False,
) -> None:
    rows, columns, depth = tile.rows, tile.columns, tile.depth
    gated = mode == "gated"
    step = columns // 2 if gated else columns
    whole = max(16, next_power_of_2(rank))
    chunk = min(whole, tile.chunk)

    def right(matrix: Tensor, inner: int) -> Any:
        """Boxes of the right factor with so many inner columns."""
        if gated:
            return _box(matrix.unflatten(0, (2, num_columns)), 2, step, inner)
        return _box(matrix, inner, columns) if transposed else _box(matrix, columns, inner)

    piece = (rows, step // tile.pieces)
    programs = _programs(x, tile)
    grid = min(programs, triton.cdiv(x.shape[0], rows) * triton.cdiv(num_columns, step))
    if not grid:
        return
    _product_kernel[(grid,)](
        _box(x, rows, depth),
        right(weight, depth),
        None if product is None else _box(product, rows, chunk),
        None if factor is None else right(factor, chunk),
        None if read is None else _box(read, *piece),
        _box(out, *piece),
        None if activated is None else _box(activated, *piece),
        x if read is None else read,
        0 if read is None else read.stride(0),
        x.shape[0],
        num_columns,
        x.shape[1],
        *(*ends, num_columns, num_columns)[:2],
        rank,
        tile.group,
        MODE=mode,
        TRANSPOSED=transposed,
        HAS_UPDATE=product is not None,
        HAS_RESIDUAL=mode == "plain" and read is not None,
        PREFETCH=prefetch and read is not None and x.is_cuda and columns >= 64,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        RANK=whole,
        CHUNK=chunk,
        PIECES=tile.pieces,
        PROGRAMS=grid if not x.is_cuda else programs,
        MERGED=tile.merged,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    product: Tensor | None,
    b: Tensor | None,
    *,
    ends: tuple[int, ...],
    tile: Tile,
    residual: Tensor | None = None,
    prefetch: bool = False,
) -> Tensor:
    """Returns Y [N, out], from bf16 x [N, in], weight [out, in], product [N, n r] and b [out, r] (None: no update).

    ends: where the columns of each of the n parts end, multiples of the tile's columns but for the last; residual:
    [N, out]. Rows contiguous, strides multiples of 16 bytes; ValueError for others.
    """
    if any(end % tile.columns for end in ends[:-1]) or len(ends) > MAX_PARTS:
        raise ValueError(f"linear: parts that end at {ends} are not in tiles of {tile.columns} columns")
    out = x.new_empty(x.shape[0], weight.shape[0])
    options: dict[str, Any] = {"num_columns": weight.shape[0], "ends": ends, "prefetch": prefetch}
    rank = 0 if b is None else b.shape[1]
    _launch("plain", x, weight, product, b, residual, out, None, tile, rank=rank, **options)
    return out


def linear_transposed(
    grad: Tensor, weight: Tensor, grad_product: Tensor | None, a: Tensor | None, *, tile: Tile
) -> Tensor:
    """Returns dX [N, in], from bf16 grad [N, out], weight [out, in], grad_product [N, n r] and a [n r, in] or None."""
    out = grad.new_empty(grad.shape[0], weight.shape[1])
    rank = 0 if a is None else a.shape[0]
    options: dict[str, Any] = {"num_columns": weight.shape[1], "transposed": True, "rank": rank}
    _launch("plain", grad, weight, grad_product, a, None, out, None, tile, **options)
    return out


def side_by_side(b: Tensor) -> Tensor:
    """Returns [2F, 2r] with B_gate top left and B_up bottom right, from b [2F, r]: what `gated_linear` multiplies."""
    wide = b.new_zeros(b.shape[0], 2 * b.shape[1])
    half = b.shape[0] // 2
    wide[:half, : b.shape[1]] = b[:half]
    wide[half:, b.shape[1] :] = b[half:]
    return wide


def gated_linear(
    x: Tensor, weight: Tensor, product: Tensor | None, b: Tensor | None, *, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Returns (gate and up [N, 2F], silu(gate) · up [N, F]), from bf16 x [N, in], weight [2F, in], product [N, 2r].

    b: [2F, 2r], as `side_by_side` makes it, or None. F must be a multiple of half the tile's columns; else ValueError.
    """
    width = weight.shape[0] // 2
    _check_columns(width, tile.columns // 2)
    out, activated = x.new_empty(x.shape[0], 2 * width), x.new_empty(x.shape[0], width)
    rank = 0 if b is None else b.shape[1]
    _launch("gated", x, weight, product, b, None, out, activated, tile, num_columns=width, rank=rank)
    return out, activated


def gated_linear_backward(
    grad: Tensor,
    weight: Tensor,
    grad_product: Tensor | None,
    a: Tensor | None,
    gate_up: Tensor,
    *,
    tile: Tile,
    prefetch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns (gradient of gate and up [N, 2F], silu(gate) · up [N, F]).

    From that of what the second matrix gives, grad [N, D], its weight [D, F], grad_product [N, r] and a [r, F] or None,
    and gate_up [N, 2F]. F must be a multiple of the tile's columns; else ValueError.
    """
    width = weight.shape[1]
    _check_columns(width, tile.columns)
    out, activated = torch.empty_like(gate_up), grad.new_empty(grad.shape[0], width)
    options: dict[str, Any] = {"num_columns": width, "transposed": True, "prefetch": prefetch}
    rank = 0 if a is None else a.shape[0]
    _launch("gated_backward", grad, weight, grad_product, a, gate_up, out, activated, tile, rank=rank, **options)
    return out, activated


def _check_columns(width: int, columns: int) -> None:
    if width % columns:
        raise ValueError(f"{width} columns of gate and of up are not in tiles of {columns}")
