"""SwiGLU between two linear layers with low-rank updates, which it adds on the way.

    g = ĝ + s P_g B_gᵀ     u = û + s P_u B_uᵀ     h = silu(g) · u     P_d = h A_dᵀ
    dh = dĥ + dP_d A_d     dg, du as in `glu`

[ĝ, û] is the output of the frozen gate_up alone, dĥ the gradient through the frozen down alone. These are the widest
tensors of a layer: here their updates cost a few tensor-core products on tiles that are read anyway, where a matmul
that adds them would read and write each once more. Saved for backward: [ĝ, û] and the products P.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels import glu
from stoker.kernels.low_rank import MAX_RANK, sum_shares
from stoker.kernels.triton_support import check_implementation, dot, jit, next_power_of_2, tl, triton


class Tile(NamedTuple):
    """Rows, columns and warps of a program."""

    rows: int
    columns: int
    warps: int


FORWARD = Tile(32, 128, 4)
BACKWARD = Tile(64, 64, 4)


class Updates(NamedTuple):
    """The adapters around a SwiGLU of F columns, all contiguous and in the working dtype.

    product: P [N, 2 r] of gate and up; b: [2 F, r] of gate and up; a_down: [r, F]; scaling: of gate and up.
    """

    product: Tensor
    b: Tensor
    a_down: Tensor
    scaling: float


def takes(b: Tensor | None, a_down: Tensor | None) -> bool:
    """Whether the kernels run these adapters: on gate, up and down, of one rank of at most MAX_RANK."""
    if b is None or a_down is None:
        return False
    return b.shape == (2 * a_down.shape[1], a_down.shape[0]) and b.shape[1] <= MAX_RANK


def forward_reference(gate_up: Tensor, updates: Updates) -> tuple[Tensor, Tensor]:
    """The formulas of the forward: (h [N, F], P_d [N, r])."""
    activated = glu.swiglu_reference(_updated(gate_up, updates))
    return activated, activated @ updates.a_down.t()


def backward_reference(
    gate_up: Tensor, grad: Tensor, grad_product_down: Tensor, updates: Updates
) -> tuple[Tensor, Tensor]:
    """The formulas of the backward: ([dg, du] [N, 2 F], h [N, F])."""
    return glu.swiglu_backward(_updated(gate_up, updates), grad + grad_product_down @ updates.a_down)


def _updated(gate_up: Tensor, updates: Updates) -> Tensor:
    parts = zip(gate_up.chunk(2, dim=1), updates.product.chunk(2, dim=1), updates.b.chunk(2), strict=True)
    return torch.cat([base + updates.scaling * (product @ b.t()) for base, product, b in parts], dim=1)


@jit
def _low_rank(  # noqa: PLR0917
    p_ptr: tl.tensor,
    row: tl.tensor,
    row_stride: tl.tensor,
    num_rows: tl.tensor,
    rank: tl.constexpr,
    RANK: tl.constexpr,
) -> tl.tensor:
    k = tl.arange(0, RANK)
    mask = (row < num_rows)[:, None] & (k < rank)[None, :]
    return tl.load(p_ptr + row[:, None] * row_stride + k[None, :], mask=mask, other=0.0)


@jit
def _forward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_ptr: tl.tensor,
    out_ptr: tl.tensor,
    share_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    p_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    rank: tl.constexpr,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, RANK)
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    low = (k < rank)[:, None] & (column < num_columns)[None, :]
    source = gate_up_ptr + row[:, None] * gate_up_stride + column[None, :]
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + num_columns, mask=mask, other=0.0).to(tl.float32)
    b = b_ptr + column[None, :] * rank + k[:, None]
    b_gate = tl.load(b, mask=low, other=0.0)
    b_up = tl.load(b + num_columns * rank, mask=low, other=0.0)
    p_gate = _low_rank(p_ptr, row, p_stride, num_rows, rank, RANK)
    p_up = _low_rank(p_ptr + rank, row, p_stride, num_rows, rank, RANK)
    gate += scaling * dot(p_gate, b_gate)
    up += scaling * dot(p_up, b_up)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * num_columns + column[None, :], out, mask=mask)
    a = tl.load(a_ptr + k[:, None] * num_columns + column[None, :], mask=low, other=0.0)
    share = dot(out, tl.trans(a)).to(share_ptr.dtype.element_ty)
    target = share_ptr + (block.to(tl.int64) * num_rows + row[:, None]) * rank + k[None, :]
    tl.store(target, share, mask=(row < num_rows)[:, None] & (k < rank)[None, :])


@jit
def _backward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    p_ptr: tl.tensor,
    b_ptr: tl.tensor,
    grad_p_down_ptr: tl.tensor,
    a_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    grad_stride: tl.tensor,
    p_stride: tl.tensor,
    grad_p_down_stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    rank: tl.constexpr,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    # Only what is elementwise: the gradient takes the place of gate_up, the activation that of its gradient.
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, RANK)
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    low = (k < rank)[:, None] & (column < num_columns)[None, :]
    source = gate_up_ptr + row[:, None] * gate_up_stride + column[None, :]
    target = grad_ptr + row[:, None] * grad_stride + column[None, :]
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + num_columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    b = b_ptr + column[None, :] * rank + k[:, None]
    p = _low_rank(p_ptr, row, p_stride, num_rows, rank, RANK)
    gate += scaling * dot(p, tl.load(b, mask=low, other=0.0))
    p = _low_rank(p_ptr + rank, row, p_stride, num_rows, rank, RANK)
    up += scaling * dot(p, tl.load(b + num_columns * rank, mask=low, other=0.0))
    a = tl.load(a_ptr + k[:, None] * num_columns + column[None, :], mask=low, other=0.0)
    p = _low_rank(grad_p_down_ptr, row, grad_p_down_stride, num_rows, rank, RANK)
    grad += dot(p, a)
    sigmoid = tl.sigmoid(gate)
    dtype = gate_up_ptr.dtype.element_ty
    tl.store(source + num_columns, (grad * gate * sigmoid).to(dtype), mask=mask)
    tl.store(source, (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=mask)
    tl.store(target, (gate * sigmoid * up).to(dtype), mask=mask)


def forward(gate_up: Tensor, updates: Updates, *, implementation: str = "reference") -> tuple[Tensor, Tensor]:
    """Returns (h [N, F], P_d [N, r]) from the frozen layer's output [N, 2 F], whose rows are contiguous.

    `implementation`: "reference" or "triton"; ValueError for an unknown one.
    """
    if not check_implementation(implementation) or not gate_up.numel():
        return forward_reference(gate_up, updates)
    num_rows, inner, rank = gate_up.shape[0], gate_up.shape[1] // 2, updates.b.shape[1]
    blocks = triton.cdiv(inner, FORWARD.columns)
    out = torch.empty((num_rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    shares = torch.empty((blocks, num_rows, rank), dtype=gate_up.dtype, device=gate_up.device)
    _forward_kernel[(blocks, triton.cdiv(num_rows, FORWARD.rows))](
        gate_up,
        updates.product,
        updates.b,
        updates.a_down,
        out,
        shares,
        gate_up.stride(0),
        updates.product.stride(0),
        num_rows,
        inner,
        rank,
        updates.scaling,
        ROWS=FORWARD.rows,
        COLUMNS=FORWARD.columns,
        RANK=max(16, next_power_of_2(rank)),
        num_warps=FORWARD.warps,
    )
    return out, sum_shares(shares, dtype=gate_up.dtype)


def backward(
    gate_up: Tensor, grad: Tensor, grad_product_down: Tensor, updates: Updates, *, implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Returns ([dg, du] [N, 2 F], h [N, F]); Triton writes them over `gate_up` and `grad`.

    grad: [N, F], the gradient through the frozen down alone; grad_product_down: dP_d [N, r], down's scaling in it. For
    `implementation` see `forward`.
    """
    if not check_implementation(implementation) or not gate_up.numel():
        return backward_reference(gate_up, grad, grad_product_down, updates)
    num_rows, inner, rank = gate_up.shape[0], gate_up.shape[1] // 2, updates.b.shape[1]
    _backward_kernel[(triton.cdiv(inner, BACKWARD.columns), triton.cdiv(num_rows, BACKWARD.rows))](
        gate_up,
        grad,
        updates.product,
        updates.b,
        grad_product_down,
        updates.a_down,
        gate_up.stride(0),
        grad.stride(0),
        updates.product.stride(0),
        grad_product_down.stride(0),
        num_rows,
        inner,
        rank,
        updates.scaling,
        ROWS=BACKWARD.rows,
        COLUMNS=BACKWARD.columns,
        RANK=max(16, next_power_of_2(rank)),
        num_warps=BACKWARD.warps,
    )
    return gate_up, grad
