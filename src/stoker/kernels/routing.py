"""The choice of experts: the largest logits of each token, and their weights.

With logits l [N, E] and the k largest at c[j]:

    normalized    w[j] = a exp(l[c[j]]) / Σ_i exp(l[c[i]])        over the chosen; else over all E in the denominator
    gradient      dl = a s (G - Σ G s)        s = w / a over E, or the softmax of all; G: the gradient of w over E

The largest is found k times. Of equal logits the first expert comes first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.triton_support import check_implementation, jit, next_power_of_2, tl, triton

_VALUES = 2048
"""Logits that a program holds."""


def choose_reference(logits: Tensor, top_k: int, *, normalized: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The formulas, in plain differentiable torch."""
    top, chosen = torch.topk(logits, top_k, dim=-1)
    if normalized:
        return torch.softmax(top, dim=-1) * scale, chosen.to(torch.int32)
    return torch.softmax(logits, dim=-1).gather(1, chosen) * scale, chosen.to(torch.int32)


@jit
def _choose_kernel(  # noqa: PLR0917
    logits_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    scale: tl.tensor,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    NORMALIZED: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    in_rows = row < num_rows
    inside = in_rows[:, None] & (expert < num_experts)[None, :]
    logits = tl.load(
        logits_ptr + row[:, None].to(tl.int64) * num_experts + expert[None, :], mask=inside, other=float("-inf")
    )
    left = logits
    values = tl.full((ROWS, SLOTS), float("-inf"), dtype=tl.float32)
    chosen = tl.zeros((ROWS, SLOTS), dtype=tl.int32)
    for index in tl.static_range(TOP_K):
        top, place = tl.max(left, axis=1, return_indices=True)
        place = tl.minimum(place, num_experts - 1)  # logits that are not numbers must not lead out of the experts
        is_slot = (slot == index)[None, :]
        values = tl.where(is_slot, top[:, None], values)
        chosen = tl.where(is_slot, place[:, None], chosen)
        left = tl.where(expert[None, :] == place[:, None], float("-inf"), left)
    highest = tl.max(values, axis=1)[:, None]
    weights = tl.exp(values - highest)
    total = tl.sum(weights, axis=1) if NORMALIZED else tl.sum(tl.exp(logits - highest), axis=1)
    weights = weights / total[:, None] * scale
    out = row[:, None].to(tl.int64) * TOP_K + slot[None, :]
    mask = in_rows[:, None] & (slot < TOP_K)[None, :]
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(chosen_ptr + out, chosen, mask=mask)


@jit
def _choose_backward_kernel(  # noqa: PLR0917
    logits_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    scale: tl.tensor,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    NORMALIZED: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    in_rows = row < num_rows
    inside = in_rows[:, None] & (expert < num_experts)[None, :]
    place = row[:, None].to(tl.int64) * num_experts + expert[None, :]
    logits = tl.load(logits_ptr + place, mask=inside, other=float("-inf"))
    grad = tl.zeros((ROWS, EXPERTS), dtype=tl.float32)
    is_chosen = tl.zeros((ROWS, EXPERTS), dtype=tl.int32)
    for index in tl.static_range(TOP_K):
        choice = row.to(tl.int64) * TOP_K + index
        at = tl.load(chosen_ptr + choice, mask=in_rows, other=0)
        is_it = expert[None, :] == at[:, None]
        grad = tl.where(is_it, tl.load(grad_ptr + choice, mask=in_rows, other=0.0).to(tl.float32)[:, None], grad)
        is_chosen = tl.where(is_it, 1, is_chosen)
    if NORMALIZED:
        logits = tl.where(is_chosen == 1, logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    share = share / tl.sum(share, axis=1)[:, None]
    mean = tl.sum(grad * share, axis=1)
    tl.store(grad_logits_ptr + place, scale * share * (grad - mean[:, None]), mask=inside)


def _rows(num_experts: int) -> int:
    return max(1, _VALUES // next_power_of_2(num_experts))


class _Choose(torch.autograd.Function):
    """The formulas of the module's docstring; logits are made into weights again in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, normalized: bool, scale: float) -> tuple[Tensor, Tensor]:
        num_rows, num_experts = logits.shape
        weights = torch.empty((num_rows, top_k), dtype=torch.float32, device=logits.device)
        chosen = torch.empty((num_rows, top_k), dtype=torch.int32, device=logits.device)
        rows = _rows(num_experts)
        _choose_kernel[(triton.cdiv(num_rows, rows),)](
            logits,
            weights,
            chosen,
            num_rows,
            num_experts,
            scale,
            TOP_K=top_k,
            SLOTS=next_power_of_2(top_k),
            ROWS=rows,
            EXPERTS=next_power_of_2(num_experts),
            NORMALIZED=normalized,
            num_warps=4,
        )
        ctx.save_for_backward(logits, chosen)
        ctx.options = normalized, scale
        ctx.mark_non_differentiable(chosen)
        return weights, chosen

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        logits, chosen = ctx.saved_tensors
        (num_rows, num_experts), rows = logits.shape, _rows(logits.shape[1])
        normalized, scale = ctx.options
        grad_logits = torch.empty_like(logits)
        _choose_backward_kernel[(triton.cdiv(num_rows, rows),)](
            logits,
            chosen,
            grads[0].contiguous(),
            grad_logits,
            num_rows,
            num_experts,
            scale,
            TOP_K=chosen.shape[1],
            ROWS=rows,
            EXPERTS=next_power_of_2(num_experts),
            NORMALIZED=normalized,
            num_warps=4,
        )
        return grad_logits, None, None, None


def choose(
    logits: Tensor, top_k: int, *, normalized: bool, scale: float = 1.0, implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Returns (weights [N, k] in float32, chosen experts [N, k] int32) of float32 `logits` [N, E], largest first.

    `normalized`: the weights of a token sum to `scale`. Gradients reach the logits through the weights.
    `implementation`: "reference" or "triton"; ValueError for another.
    """
    if not check_implementation(implementation) or not logits.numel():
        return choose_reference(logits, top_k, normalized=normalized, scale=scale)
    weights, chosen = _Choose.apply(logits.contiguous(), top_k, normalized, scale)
    return weights, chosen
