"""AdamW (arXiv:1711.05101) on fp32 weights whose two averages are kept in 8 bits a value, with a scale for each block.

    m = s₁ d(a)    v = s₂ d(b)                           a, b: codes of a value; s: scales of its block
    m ← m + (1 − β₁)(g − m)        v ← v + (1 − β₂)(g² − v)
    w ← w (1 − η λ) − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    s₁ = max |m|    s₂ = max v    a, b: the codes nearest to m / s₁ and v / s₂

The step uses m and v as they are computed; they are rounded afterwards. The code is the dynamic one of 8-bit optimisers
(Dettmers et al., arXiv:2110.02861): seven decades, the upper half of each cut into twice as many equal cells as the one
below, so that values of very different size in one block keep a share of their own size. Two things are not theirs:

- The largest value of a block is kept exactly, also where it is negative: 1 takes the place of the last cell of m.
- A v that is not zero never becomes zero, which would make the next step of its weight one of m / ε.

A block is BLOCK_SIZE values of one row, or what is left of it: none crosses the end of a row. So whoever holds some of
the rows computes what one that holds all of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels.adamw import AdamWStep
from stoker.kernels.triton_support import check_implementation, constant, jit, next_power_of_2, tl, triton

BLOCK_SIZE = 256
"""Values of a row that share a scale."""
_DECADES = 7
# Cells of the lowest decade: m needs a bit for its sign, v none.
_FIRST_CELLS, _SECOND_CELLS = 1, 2
# What is between two neighbouring codes goes to the nearer. Half of the smallest m, and between the two largest codes.
_FIRST_ZERO, _FIRST_TOP, _SECOND_TOP = constant(2.75e-7), constant(0.989453125), constant(0.998242187)
# Blocks of smaller values count as zeros: the reciprocal of their scale would overflow.
_LEAST = 1e-36
_LEAST_SCALE = constant(_LEAST)
# Values that the reference works on at a time, and that a program of the kernel does.
_PIECE, _TILE = 2**20, 1024


class Average(NamedTuple):
    """A running average: `code` in the weight's shape (int8 of m, uint8 of v), `scale` fp32 [..., blocks of a row]."""

    code: Tensor
    scale: Tensor


def scale_shape(shape: torch.Size) -> torch.Size:
    """Returns the shape of the scales of a weight of `shape`, which has at least one dimension."""
    return torch.Size((*shape[:-1], -(-shape[-1] // BLOCK_SIZE)))


@cache
def codes(*, signed: bool) -> Tensor:
    """Returns what codes from 0 on stand for, ascending: 128 sizes of m (codes of -127 to 127), or 256 values of v."""
    first = _FIRST_CELLS if signed else _SECOND_CELLS
    values = [0.0]
    for decade in range(_DECADES):
        cells = first << decade
        values += [10.0 ** (decade - _DECADES + 1) * (0.1 + 0.9 * (cell + 0.5) / cells) for cell in range(cells)]
    return torch.tensor([*values[:-1], 1.0] if signed else [*values, 1.0])


@cache
def _bounds(*, signed: bool) -> Tensor:
    values = codes(signed=signed)
    bounds = (values[1:] + values[:-1]) / 2
    if not signed:
        bounds[0] = 0.0
    return bounds


def quantize(values: Tensor, *, signed: bool) -> Average:
    """Returns fp32 `values` [..., D] in 8 bits; those that are not `signed` must be at least zero."""
    width = values.shape[-1]
    blocks = torch.nn.functional.pad(values, (0, -width % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE))
    scale = blocks.abs().amax(-1)
    inverse = torch.where(scale > _LEAST, 1.0 / scale, 0.0)
    shares = (blocks * inverse.unsqueeze(-1)).flatten(-2)[..., :width]
    index = torch.bucketize(shares.abs(), _bounds(signed=signed).to(values.device), out_int32=True)
    code = (index * shares.sign()).to(torch.int8) if signed else index.to(torch.uint8)
    return Average(code, scale)


def dequantize(average: Average) -> Tensor:
    """Returns the values in fp32."""
    code, scale = average
    signed = code.dtype == torch.int8
    index = code.to(torch.int32)
    shares = codes(signed=signed).to(code.device)[index.abs()] * (index.sign() if signed else 1)
    return shares * scale.repeat_interleave(BLOCK_SIZE, -1)[..., : code.shape[-1]]


def adamw_8bit_(
    weight: Tensor,
    grad: Tensor,
    average: Average,
    square: Average,
    numbers: AdamWStep,
    *,
    implementation: str = "reference",
) -> None:
    """Takes one step in place on `weight` [..., D] (fp32) and its averages, all contiguous; `grad` is only read.

    `implementation`: "reference" or "triton"; ValueError for an unknown one, for tensors that are not contiguous, and
    for scales of another shape than `scale_shape` says.
    """
    is_triton = check_implementation(implementation)
    grad = grad.contiguous()
    held = (weight, *average, *square)
    if not all(tensor.is_contiguous() for tensor in held):
        raise ValueError("AdamW's step needs contiguous weights and averages")
    for one in (average, square):
        if one.scale.shape != scale_shape(weight.shape):
            raise ValueError(f"scales of {tuple(weight.shape)} are {tuple(one.scale.shape)}: {BLOCK_SIZE} share one")
    if not weight.numel():
        return
    width = weight.shape[-1]
    rows = [tensor.view(-1, tensor.shape[-1]) for tensor in (weight, grad, *average, *square)]
    if is_triton:
        _launch(rows, numbers)
        return
    for where, blocks in _pieces(rows[0].shape[0], width):
        weight, grad, a, a_scale, b, b_scale = (
            one[blocks if index in (3, 5) else where] for index, one in enumerate(rows)
        )
        _step_reference(weight, grad, Average(a, a_scale), Average(b, b_scale), numbers)


def _pieces(num_rows: int, width: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Boxes of values and of their scales, of whole blocks and about _PIECE values."""
    columns = min(width, _PIECE)
    rows = max(1, _PIECE // columns)
    for row in range(0, num_rows, rows):
        for column in range(0, width, columns):
            first = column // BLOCK_SIZE
            last = -(-min(column + columns, width) // BLOCK_SIZE)
            down = slice(row, row + rows)
            yield (down, slice(column, column + columns)), (down, slice(first, last))


def _step_reference(weight: Tensor, grad: Tensor, average: Average, square: Average, numbers: AdamWStep) -> None:
    m, v = dequantize(average), dequantize(square)
    g = grad.float() * numbers.gradient_scale
    m += (g - m) * (1.0 - numbers.first_beta)
    v += (g * g - v) * (1.0 - numbers.second_beta)
    denominator = v.sqrt() * numbers.inverse_root + numbers.epsilon
    weight.mul_(1.0 - numbers.learning_rate * numbers.weight_decay).sub_(numbers.size * (m / denominator))
    for held, values in ((average, m), (square, v)):
        for old, new in zip(held, quantize(values, signed=held is average), strict=True):
            old.copy_(new)


@jit
def _decoded(code: tl.tensor, CELLS: tl.constexpr) -> tl.tensor:
    """What a code above zero and below the largest stands for, as a share: CELLS are those of the lowest decade."""
    cells, power = tl.full(code.shape, CELLS, tl.float32), tl.full(code.shape, 1e-6, tl.float32)
    code = code.to(tl.float32)
    above = code >= 2 * CELLS
    cells, power = tl.where(above, 2.0 * CELLS, cells), tl.where(above, 1e-5, power)
    above = code >= 4 * CELLS
    cells, power = tl.where(above, 4.0 * CELLS, cells), tl.where(above, 1e-4, power)
    above = code >= 8 * CELLS
    cells, power = tl.where(above, 8.0 * CELLS, cells), tl.where(above, 1e-3, power)
    above = code >= 16 * CELLS
    cells, power = tl.where(above, 16.0 * CELLS, cells), tl.where(above, 1e-2, power)
    above = code >= 32 * CELLS
    cells, power = tl.where(above, 32.0 * CELLS, cells), tl.where(above, 1e-1, power)
    above = code >= 64 * CELLS
    cells, power = tl.where(above, 64.0 * CELLS, cells), tl.where(above, 1.0, power)
    return (0.1 + 0.9 * (code - cells + 0.5) / cells) * power


@jit
def _encoded(share: tl.tensor, CELLS: tl.constexpr) -> tl.tensor:
    """The number of the nearest cell, from CELLS on, as fp32.

    A decade begins, for what is rounded to it, where its first cell is as near as the last of the one below.
    """
    cells, power = tl.full(share.shape, CELLS, tl.float32), tl.full(share.shape, 1e6, tl.float32)
    above = share > 1e-6 * (1.0 + 1.8 / (2.0 * CELLS))
    cells, power = tl.where(above, 2.0 * CELLS, cells), tl.where(above, 1e5, power)
    above = share > 1e-5 * (1.0 + 1.8 / (4.0 * CELLS))
    cells, power = tl.where(above, 4.0 * CELLS, cells), tl.where(above, 1e4, power)
    above = share > 1e-4 * (1.0 + 1.8 / (8.0 * CELLS))
    cells, power = tl.where(above, 8.0 * CELLS, cells), tl.where(above, 1e3, power)
    above = share > 1e-3 * (1.0 + 1.8 / (16.0 * CELLS))
    cells, power = tl.where(above, 16.0 * CELLS, cells), tl.where(above, 1e2, power)
    above = share > 1e-2 * (1.0 + 1.8 / (32.0 * CELLS))
    cells, power = tl.where(above, 32.0 * CELLS, cells), tl.where(above, 1e1, power)
    above = share > 1e-1 * (1.0 + 1.8 / (64.0 * CELLS))
    cells, power = tl.where(above, 64.0 * CELLS, cells), tl.where(above, 1.0, power)
    cell = tl.floor((share * power - 0.1) * (cells / 0.9))
    return cells + tl.minimum(tl.maximum(cell, 0.0), cells - 1.0)


@jit
def _first_values(code: tl.tensor) -> tl.tensor:
    size = tl.abs(code.to(tl.int32))
    share = tl.where(size == 127, 1.0, _decoded(size, 1))
    share = tl.where(size == 0, 0.0, share)
    return tl.where(code < 0, -share, share)


@jit
def _first_codes(share: tl.tensor) -> tl.tensor:
    size = tl.abs(share)
    code = tl.where(size > _FIRST_TOP, 127.0, tl.minimum(_encoded(size, 1), 126.0))
    code = tl.where(size > _FIRST_ZERO, code, 0.0)
    return tl.where(share < 0, -code, code).to(tl.int8)


@jit
def _second_values(code: tl.tensor) -> tl.tensor:
    code = code.to(tl.int32)
    share = tl.where(code == 255, 1.0, _decoded(code + 1, 2))
    return tl.where(code == 0, 0.0, share)


@jit
def _second_codes(share: tl.tensor) -> tl.tensor:
    code = tl.where(share > _SECOND_TOP, 255.0, _encoded(share, 2) - 1.0)
    return tl.where(share > 0, code, 0.0).to(tl.int32).to(tl.uint8)


@jit
def _step_kernel(  # noqa: PLR0917
    weight_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    a_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    width: tl.tensor,
    blocks_of_a_row: tl.tensor,
    num_blocks: tl.tensor,
    grad_scale: tl.tensor,
    first_weight: tl.tensor,
    second_weight: tl.tensor,
    kept: tl.tensor,
    size: tl.tensor,
    inverse_root: tl.tensor,
    epsilon: tl.tensor,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = (block % blocks_of_a_row)[:, None] * BLOCK + tl.arange(0, LANES)[None, :]
    place = (block // blocks_of_a_row)[:, None] * width + column
    is_block = block < num_blocks
    mask = is_block[:, None] & (column < width)
    weight = tl.load(weight_ptr + place, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * grad_scale
    a = tl.load(a_ptr + place, mask=mask, other=0)
    b = tl.load(b_ptr + place, mask=mask, other=0)
    m = _first_values(a) * tl.load(a_scale_ptr + block, mask=is_block, other=0.0)[:, None]
    v = _second_values(b) * tl.load(b_scale_ptr + block, mask=is_block, other=0.0)[:, None]
    m += (grad - m) * first_weight
    v += (grad * grad - v) * second_weight
    weight = weight * kept - size * (m / (tl.sqrt(v) * inverse_root + epsilon))
    tl.store(weight_ptr + place, weight, mask=mask)
    a_scale, b_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
    a_inverse = tl.where(a_scale > _LEAST_SCALE, 1.0 / tl.maximum(a_scale, _LEAST_SCALE), 0.0)
    b_inverse = tl.where(b_scale > _LEAST_SCALE, 1.0 / tl.maximum(b_scale, _LEAST_SCALE), 0.0)
    tl.store(a_ptr + place, _first_codes(m * a_inverse[:, None]), mask=mask)
    tl.store(b_ptr + place, _second_codes(v * b_inverse[:, None]), mask=mask)
    tl.store(a_scale_ptr + block, a_scale, mask=is_block)
    tl.store(b_scale_ptr + block, b_scale, mask=is_block)


def _launch(rows: list[Tensor], numbers: AdamWStep) -> None:
    num_rows, width = rows[0].shape
    blocks_of_a_row = rows[3].shape[1]
    num_blocks = num_rows * blocks_of_a_row
    lanes = min(BLOCK_SIZE, next_power_of_2(width))
    blocks = max(1, _TILE // lanes)
    _step_kernel[(triton.cdiv(num_blocks, blocks),)](
        *rows,
        width,
        blocks_of_a_row,
        num_blocks,
        *numbers.factors,
        BLOCK=BLOCK_SIZE,
        LANES=lanes,
        BLOCKS=blocks,
        num_warps=4,
    )
