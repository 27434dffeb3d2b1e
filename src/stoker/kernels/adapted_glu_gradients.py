"""A gated activation's backward with the adapters' gradients on both sides of it, in one read of what it reads.

    [g, u] = gate_up, the adapters' updates in it         h = a(g) · u            dh: the gradient of h
    dg = dh · u · a'(g)                                   du = dh · a(g)          (a: see `glu`)
    of gate and up, with P = x Aᵀ:     dP = s [dg B_g, du B_u]       dB = s [dgᵀ P_g; duᵀ P_u]
    of down, with dP_d = s dY B_d:     dA_d = dP_dᵀ h

Apart, these are five passes over tensors as wide as the feed-forward, the widest of a model, and h must be written for
the last. Here a program takes a block of columns and a run of rows, as in `low_rank`: it keeps its shares of dB and
dA_d in registers, writes its share of dP, and h is never stored. The shares are summed in a fixed order, in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels import glu
from stoker.kernels.glu import activate
from stoker.kernels.low_rank import MAX_RANK, grad_pair_reference, sum_shares
from stoker.kernels.triton_support import check_implementation, dot, jit, next_power_of_2, tl, triton


class Tile(NamedTuple):
    """Rows, columns and warps of a program."""

    rows: int
    columns: int
    warps: int


TILE = Tile(64, 64, 8)
ROWS_A_PROGRAM = 1024


class Gradients(NamedTuple):
    """What the backward gives: of gate_up [N, 2 F] and P [N, 2 r], and in fp32 of B [2 F, r] and A_d [r, F]."""

    gate_up: Tensor
    product: Tensor
    b: Tensor
    a_down: Tensor


def takes(b: Tensor | None, a_down: Tensor | None) -> bool:
    """Whether `backward` runs these adapters: on gate, up and down, of one rank of at most MAX_RANK."""
    if b is None or a_down is None:
        return False
    return b.shape == (2 * a_down.shape[1], a_down.shape[0]) and b.shape[1] <= MAX_RANK


def backward_reference(
    gate_up: Tensor,
    grad: Tensor,
    product: Tensor,
    b: Tensor,
    grad_product_down: Tensor,
    *,
    scaling: float,
    activation: str = "silu",
) -> Gradients:
    """The formulas, op by op; writes over `gate_up` and `grad`."""
    inner = grad.shape[1]
    grad_gate_up, activated = glu.gated_backward(gate_up, grad, activation=activation)
    slices = (slice(0, inner), slice(inner, 2 * inner))
    grad_p, grad_b = grad_pair_reference(grad_gate_up, product, b, slices=slices, scaling=scaling)
    return Gradients(grad_gate_up, grad_p, grad_b.float(), (grad_product_down.t() @ activated).float())


@jit
def _gradients_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    p_down_ptr: tl.tensor,
    share_p_ptr: tl.tensor,
    part_b_ptr: tl.tensor,
    part_a_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    grad_stride: tl.tensor,
    p_stride: tl.tensor,
    p_down_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    rank: tl.constexpr,
    rows_a_program: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    block, split = tl.program_id(0), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    in_columns, in_rank = column < num_columns, k < rank
    low = in_columns[:, None] & in_rank[None, :]
    low_offset = column[:, None] * rank + k[None, :]
    b_gate = tl.load(b_ptr + low_offset, mask=low, other=0.0)
    b_up = tl.load(b_ptr + num_columns * rank + low_offset, mask=low, other=0.0)
    share_gate = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    share_up = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    share_down = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    dtype = gate_up_ptr.dtype.element_ty
    end = tl.minimum(num_rows, (split + 1) * rows_a_program)
    for start in range(split * rows_a_program, end, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        in_rows = row < end
        mask = in_rows[:, None] & in_columns[None, :]
        source = gate_up_ptr + row[:, None] * gate_up_stride + column[None, :]
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + num_columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value, slope = activate(gate, ACTIVATION)
        grad_up = (grad * value).to(dtype)
        grad_gate = (grad * up * slope).to(dtype)
        activated = (value * up).to(dtype)
        tl.store(source, grad_gate, mask=mask)
        tl.store(source + num_columns, grad_up, mask=mask)
        low_rows = in_rows[:, None] & in_rank[None, :]
        p = p_ptr + row[:, None] * p_stride + k[None, :]
        share_gate += dot(tl.trans(grad_gate), tl.load(p, mask=low_rows, other=0.0))
        share_up += dot(tl.trans(grad_up), tl.load(p + rank, mask=low_rows, other=0.0))
        p_down = tl.load(p_down_ptr + row[:, None] * p_down_stride + k[None, :], mask=low_rows, other=0.0)
        share_down += dot(tl.trans(activated), p_down)
        target = share_p_ptr + (block.to(tl.int64) * num_rows + row[:, None]) * (2 * rank) + k[None, :]
        tl.store(target, dot(grad_gate, b_gate).to(share_p_ptr.dtype.element_ty), mask=low_rows)
        tl.store(target + rank, dot(grad_up, b_up).to(share_p_ptr.dtype.element_ty), mask=low_rows)
    part_b = part_b_ptr + split.to(tl.int64) * (2 * num_columns * rank) + low_offset
    tl.store(part_b, share_gate, mask=low)
    tl.store(part_b + num_columns * rank, share_up, mask=low)
    tl.store(part_a_ptr + split.to(tl.int64) * (num_columns * rank) + low_offset, share_down, mask=low)


def backward(
    gate_up: Tensor,
    grad: Tensor,
    product: Tensor,
    b: Tensor,
    grad_product_down: Tensor,
    *,
    scaling: float,
    activation: str = "silu",
    implementation: str = "reference",
) -> Gradients:
    """Returns the gradients, that of gate_up [N, 2 F] written over it.

    grad: [N, F], whole; product: P [N, 2 r]; b: B [2 F, r] in the dtype of gate_up; grad_product_down: dP_d [N, r] with
    down's scaling in it; scaling: of gate and up; activation: of `glu.ACTIVATIONS`. `implementation`: "reference" or
    "triton". ValueError for an unknown one, or when Triton is asked for what `takes` refuses.
    """
    if not check_implementation(implementation) or not gate_up.numel():
        return backward_reference(gate_up, grad, product, b, grad_product_down, scaling=scaling, activation=activation)
    num_rows, inner = grad.shape
    rank = b.shape[1]
    if b.shape[0] != 2 * inner or product.shape[1] != 2 * rank or rank > MAX_RANK:
        raise ValueError(f"adapters of shapes {tuple(b.shape)} and {tuple(product.shape)} on {inner} channels")
    device, b = grad.device, b.contiguous()
    blocks, splits = triton.cdiv(inner, TILE.columns), triton.cdiv(num_rows, ROWS_A_PROGRAM)
    share_p = torch.empty((blocks, num_rows, 2 * rank), dtype=product.dtype, device=device)
    part_b = torch.empty((splits, 2 * inner, rank), dtype=torch.float32, device=device)
    part_a = torch.empty((splits, inner, rank), dtype=torch.float32, device=device)
    _gradients_kernel[(blocks, splits)](
        gate_up,
        grad,
        product,
        b,
        grad_product_down,
        share_p,
        part_b,
        part_a,
        gate_up.stride(0),
        grad.stride(0),
        product.stride(0),
        grad_product_down.stride(0),
        num_rows,
        inner,
        rank,
        ROWS_A_PROGRAM,
        ROWS=TILE.rows,
        COLUMNS=TILE.columns,
        RANK=max(16, next_power_of_2(rank)),
        ACTIVATION=activation,
        num_warps=TILE.warps,
    )
    return Gradients(
        gate_up,
        sum_shares(share_p, dtype=product.dtype, scaling=scaling),
        sum_shares(part_b, dtype=torch.float32, scaling=scaling),
        sum_shares(part_a, dtype=torch.float32).t(),
    )
