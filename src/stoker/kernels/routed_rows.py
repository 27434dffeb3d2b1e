"""Rows on their way to experts and back: sorting by expert, the gate between two products, the weighted sum.

    sort       sorted row m is choice c = order[m] of token c // k; place[c] is the inverse
    gate       H[m] = σ(g) g u of [g, u] = Z[m], or gpt-oss' clamped form
    gate back  dZ[m] = w[m] dH[m] ∂H/∂Z        H'[m] = w[m] H[m]        dw[m] = dH[m] · H[m]
    combine    y[t] = Σ_j w[t, j] Y[place[t k + j]]

The weight w of a choice multiplies the expert's output, so that its gradient dy[t] · Y[m] equals dH[m] · H[m] with the
gradient dH = dy W_down before the weight: the output Y is not needed again. Sums run in a fixed order.

gpt-oss' gate: g clamped from above and u on both sides to the limit l, then (u + 1) g σ(1.702 g).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels.triton_support import check_implementation, jit, jit_unspecialized, next_power_of_2, tl, triton

ALPHA = 1.702
"""gpt-oss' factor inside the sigmoid."""
_BLOCK = 1024
_CHOICES = 256
"""Choices that a program of the sort places."""
_COMPARED = 8192
"""Choices times experts that it compares at once, which fit in registers."""
_MAX_EXPERTS = 512


class Order(NamedTuple):
    """How choices [N, k] are sorted by expert, M = N k of them; all int32 on the device.

    `tokens` [M]: the token of each sorted row; `place` [M]: where choice t k + j went; `order` [M]: the choice of each
    sorted row; `ends` [E]: where each expert's rows end.
    """

    tokens: Tensor
    place: Tensor
    order: Tensor
    ends: Tensor


def sort_by_expert_reference(chosen: Tensor, num_experts: int) -> Order:
    """The order by torch's stable sort."""
    num_choices, top_k = chosen.numel(), chosen.shape[1]
    experts, order = torch.sort(chosen.flatten().to(torch.int32), stable=True)
    of_expert = torch.arange(num_experts, device=chosen.device, dtype=torch.int32)
    ends = torch.searchsorted(experts, of_expert, right=True, out_int32=True)
    place = torch.empty(num_choices, dtype=torch.int32, device=chosen.device)
    place[order] = torch.arange(num_choices, dtype=torch.int32, device=chosen.device)
    return Order((order // top_k).to(torch.int32), place, order.to(torch.int32), ends)


@jit
def _count_kernel(  # noqa: PLR0917
    chosen_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_choices: tl.tensor,
    CHOICES: tl.constexpr,
    PART: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    # How many of a block's choices each expert has.
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), dtype=tl.int32)
    for part in range(0, CHOICES, PART):
        choice = block * CHOICES + part + tl.arange(0, PART)
        chosen = tl.load(chosen_ptr + choice, mask=choice < num_choices, other=EXPERTS)
        count += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * EXPERTS + expert, count)


@jit_unspecialized("num_blocks")
def _place_kernel(  # noqa: PLR0917
    chosen_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    place_ptr: tl.tensor,
    order_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    num_choices: tl.tensor,
    num_blocks: tl.tensor,
    num_experts: tl.tensor,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    PART: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    # A choice comes after all of earlier experts, those of its own in earlier blocks, and those before it in its block.
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_blocks, PART):
        other = start + tl.arange(0, PART)
        counts = counts_ptr + other[:, None] * EXPERTS + expert[None, :]
        count = tl.load(counts, mask=(other < num_blocks)[:, None], other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], count, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    if block == 0:
        tl.store(ends_ptr + expert, ends, mask=expert < num_experts)
    first = ends - total + before
    for part in range(0, CHOICES, PART):
        choice = block * CHOICES + part + tl.arange(0, PART)
        inside = choice < num_choices
        chosen = tl.load(chosen_ptr + choice, mask=inside, other=EXPERTS)
        is_it = (chosen[:, None] == expert[None, :]).to(tl.int32)
        place = tl.sum(is_it * (first[None, :] + tl.cumsum(is_it, axis=0) - 1), axis=1)
        tl.store(place_ptr + choice, place, mask=inside)
        tl.store(order_ptr + place, choice, mask=inside)
        tl.store(tokens_ptr + place, choice // TOP_K, mask=inside)
        first += tl.sum(is_it, axis=0)


def sort_by_expert(chosen: Tensor, num_experts: int, *, implementation: str = "reference") -> Order:
    """Returns the order of `chosen` [N, k], integer experts; within an expert tokens keep theirs. Nothing waits.

    With Triton it is a counting sort of two launches; torch's sort by digits takes a dozen.
    """
    if not check_implementation(implementation) or not chosen.numel() or num_experts > _MAX_EXPERTS:
        return sort_by_expert_reference(chosen, num_experts)
    chosen, experts = chosen.to(torch.int32).contiguous(), next_power_of_2(num_experts)
    num_choices, device = chosen.numel(), chosen.device
    num_blocks = triton.cdiv(num_choices, _CHOICES)
    sizes = {"CHOICES": _CHOICES, "PART": min(_CHOICES, _COMPARED // experts), "EXPERTS": experts}
    counts = torch.empty((num_blocks, experts), dtype=torch.int32, device=device)
    # Zeros, not whatever was there: torch indexes with them, and in a rehearsal (`kernels.ahead`) nothing else is.
    tokens, place, order = torch.zeros((3, num_choices), dtype=torch.int32, device=device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    _count_kernel[(num_blocks,)](chosen, counts, num_choices, **sizes, num_warps=4)
    _place_kernel[(num_blocks,)](
        chosen,
        counts,
        tokens,
        place,
        order,
        ends,
        num_choices,
        num_blocks,
        num_experts,
        TOP_K=chosen.shape[1],
        **sizes,
        num_warps=4,
    )
    return Order(tokens, place, order, ends)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gate_reference(gate_up: Tensor, limit: float | None) -> Tensor:
    """The formula of the gate, [M, 2 I] to [M, I]; differentiable."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is None:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(ALPHA * gate)


def gate_backward_reference(
    gate_up: Tensor, grad: Tensor, weights: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of the gate's backward: (dZ, H', dw)."""
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        out = gate_reference(leaf, limit)
    weights = weights[:, None].to(grad.dtype)
    (grad_gate_up,) = torch.autograd.grad(out, leaf, weights * grad)
    out = out.detach()
    return grad_gate_up, weights * out, (_wide(out) * _wide(grad)).sum(1)


@jit
def _gate_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    limit: tl.tensor,
    BLOCK: tl.constexpr,
    CLAMPED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    source = gate_up_ptr + row * 2 * num_columns + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + num_columns, mask=mask, other=0.0).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        out = (up + 1) * gate * tl.sigmoid(1.702 * gate)
    else:
        out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * num_columns + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _gate_backward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    num_columns: tl.tensor,
    limit: tl.tensor,
    BLOCK: tl.constexpr,
    CLAMPED: tl.constexpr,
) -> None:
    # dZ takes the place of gate_up, H' that of grad. A program has a whole row, for the sum of dw.
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_columns
        source = gate_up_ptr + row * 2 * num_columns + column
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + num_columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * num_columns + column, mask=mask, other=0.0).to(tl.float32)
        if CLAMPED:
            low = gate <= limit
            inside = (up >= -limit) & (up <= limit)
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            sigmoid = tl.sigmoid(1.702 * gate)
            out = (up + 1) * gate * sigmoid
            grad_gate = tl.where(low, (up + 1) * sigmoid * (1 + 1.702 * gate * (1 - sigmoid)), 0.0)
            grad_up = tl.where(inside, gate * sigmoid, 0.0)
        else:
            sigmoid = tl.sigmoid(gate)
            out = gate * sigmoid * up
            grad_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
            grad_up = gate * sigmoid
        total += out * grad
        weighted = weight * grad
        dtype = gate_up_ptr.dtype.element_ty
        tl.store(source, (weighted * grad_gate).to(dtype), mask=mask)
        tl.store(source + num_columns, (weighted * grad_up).to(dtype), mask=mask)
        tl.store(grad_ptr + row * num_columns + column, (weight * out).to(dtype), mask=mask)
    tl.store(grad_weight_ptr + row, tl.sum(total, axis=0))


def gate(gate_up: Tensor, *, limit: float | None = None, implementation: str = "reference") -> Tensor:
    """Returns H [M, I] from contiguous `gate_up` [M, 2 I], gate first; `limit`: gpt-oss' form. No gradients."""
    if not check_implementation(implementation) or not gate_up.numel():
        return gate_reference(gate_up, limit)
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, num_columns), dtype=gate_up.dtype, device=gate_up.device)
    block = min(_BLOCK, next_power_of_2(num_columns))
    _gate_kernel[(num_rows, triton.cdiv(num_columns, block))](
        gate_up, out, num_columns, limit or 0.0, BLOCK=block, CLAMPED=limit is not None, num_warps=4
    )
    return out


def gate_backward(
    gate_up: Tensor, grad: Tensor, weights: Tensor, *, limit: float | None = None, implementation: str = "reference"
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dZ [M, 2 I], H' = w H [M, I], dw [M] in fp32) from gate_up, dH [M, I] and w [M], all contiguous.

    Triton writes dZ over `gate_up` and H' over `grad`.
    """
    if not check_implementation(implementation) or not gate_up.numel():
        return gate_backward_reference(gate_up, grad, weights, limit)
    num_rows, num_columns = grad.shape
    grad_weights = torch.empty(num_rows, dtype=torch.float32, device=grad.device)
    block = min(_BLOCK, next_power_of_2(num_columns))
    _gate_backward_kernel[(num_rows,)](
        gate_up,
        grad,
        weights,
        grad_weights,
        num_columns,
        limit or 0.0,
        BLOCK=block,
        CLAMPED=limit is not None,
        num_warps=4,
    )
    return gate_up, grad, grad_weights


def combine_reference(rows: Tensor, place: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """The formula of the weighted sum, in float32 at least."""
    taken = _wide(rows[place].view(-1, top_k, rows.shape[1]))
    if weights is not None:
        taken = taken * weights.view(-1, top_k, 1)
    return taken.sum(1).to(rows.dtype)


@jit
def _combine_kernel(  # noqa: PLR0917
    rows_ptr: tl.tensor,
    place_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + choice).to(tl.int64)
        value = tl.load(rows_ptr + row * num_columns + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_ptr + token * TOP_K + choice).to(tl.float32)
        total += value
    tl.store(out_ptr + token * num_columns + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(
    rows: Tensor, place: Tensor, weights: Tensor | None, top_k: int, *, implementation: str = "reference"
) -> Tensor:
    """Returns for each token the sum of its `top_k` rows, weighed by `weights` [N, k] if there: [N, D] of [M, D]."""
    if not check_implementation(implementation) or not rows.numel():
        return combine_reference(rows, place, weights, top_k)
    num_tokens, num_columns = rows.shape[0] // top_k, rows.shape[1]
    out = torch.empty((num_tokens, num_columns), dtype=rows.dtype, device=rows.device)
    block = min(_BLOCK, next_power_of_2(num_columns))
    _combine_kernel[(num_tokens, triton.cdiv(num_columns, block))](
        rows,
        place,
        rows if weights is None else weights,
        out,
        num_columns,
        TOP_K=top_k,
        BLOCK=block,
        WEIGHTED=weights is not None,
        num_warps=4,
    )
    return out
