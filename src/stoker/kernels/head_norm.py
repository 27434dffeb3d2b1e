"""Queries and keys of a fused projection normed head by head, then turned: one pass each way (Qwen3, Gemma 3).

For a head x of E channels, with r = (mean(x²) + ε)^-½ and a weight w [E] that all heads share:

    n = x · r · w          q = rotate(n)          (`rms_norm`, `rope`; values pass unchanged)
    m = rotate back (dq)   g = m · w              dx = r · g − x · (r³ / E) · Σ (g · x)        dw = Σ m · x · r

Kept for the backward: the projection's output alone. Op by op, norms and rotation would read and write it three times
each way and keep three copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.rms_norm import rms_norm
from stoker.kernels.rope import rotate_reference
from stoker.kernels.triton_support import (
    check_implementation,
    contiguous_channels,
    jit,
    next_power_of_2,
    num_programs,
    tl,
)


def norm_split_and_rotate(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    epsilon: float,
    num_heads: int,
    num_kv_heads: int,
    implementation: str = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q [B, T, H, E], k and v [B, T, K, E] of qkv [B, T, (H + 2K) · E], q and k normed and turned by halves.

    q_weight, k_weight: [E]; cos, sin: [1 or B, T, E/2], fp32. Gradients of qkv and both weights. `implementation`:
    "reference" or "triton" (whose results are views of one buffer); ValueError for an unknown one.
    """
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    if check_implementation(implementation):
        return _NormSplitAndRotate.apply(qkv, q_weight, k_weight, cos, sin, epsilon, sizes)
    return norm_split_and_rotate_reference(qkv, q_weight, k_weight, cos, sin, epsilon=epsilon, sizes=sizes)


def norm_split_and_rotate_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, epsilon: float, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas, op by op; `sizes` are the numbers of query, key and value heads."""
    q, k, v = qkv.unflatten(-1, (sum(sizes), -1)).split(tuple(sizes), dim=2)
    q, k = rms_norm(q, q_weight, epsilon), rms_norm(k, k_weight, epsilon)
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin), v


def norm_split_and_rotate_backward(  # noqa: PLR0917 - as the autograd function has them
    grads: Sequence[Tensor],
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    epsilon: float,
    needs_weights: bool,
    implementation: str = "reference",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of qkv [B, T, (H + 2K) · E] and of both weights (None if not needed) from those of q, k, v.

    For callers that write their own backward; the arguments are those of `norm_split_and_rotate`.
    """
    if check_implementation(implementation):
        return launch_backward(grads, qkv, q_weight, k_weight, cos, sin, epsilon, needs_weights=needs_weights)
    leaves = [x.detach().requires_grad_() for x in (qkv, q_weight, k_weight)]
    sizes = tuple(grad.shape[2] for grad in grads)
    with torch.enable_grad():
        outputs = norm_split_and_rotate_reference(
            leaves[0], leaves[1], leaves[2], cos, sin, epsilon=epsilon, sizes=sizes
        )
    if needs_weights:
        grad_qkv, grad_q, grad_k = torch.autograd.grad(outputs, leaves, tuple(grads))
        return grad_qkv, grad_q, grad_k
    return torch.autograd.grad(outputs, leaves[0], tuple(grads))[0], None, None


@jit
def _forward_kernel(  # noqa: PLR0917
    qkv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    length: tl.tensor,
    table_batch: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    half: tl.tensor,
    epsilon: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    # One token a program: its angles and the weights are loaded once for all its heads.
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    channel = tl.arange(0, HALF)[None, :]
    there = channel < half
    angle = batch * table_batch + position * half + channel
    cos = tl.load(cos_ptr + angle, mask=there, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=there, other=0.0)
    source, target = qkv_ptr + token * qkv_stride, out_ptr + token * (num_heads + 2 * num_kv_heads) * 2 * half
    dtype = out_ptr.dtype.element_ty
    for first in range(0, num_heads + 2 * num_kv_heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        mask = (head < num_heads + 2 * num_kv_heads) & there
        at = head * 2 * half + channel
        low = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + at + half, mask=mask, other=0.0).to(tl.float32)
        is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
        weight_low, weight_high = _weights(q_weight_ptr, k_weight_ptr, channel, half, is_query, mask)
        square = tl.sum(low * low + high * high, axis=1)[:, None]
        rstd = 1.0 / tl.sqrt(square / (2 * half) + epsilon)
        # Rounded as a norm on its own would be, whose result the rotation reads.
        normed_low = (low * rstd * weight_low).to(dtype).to(tl.float32)
        normed_high = (high * rstd * weight_high).to(dtype).to(tl.float32)
        tl.store(target + at, tl.where(is_value, low, normed_low * cos - normed_high * sin).to(dtype), mask=mask)
        turned = normed_high * cos + normed_low * sin
        tl.store(target + at + half, tl.where(is_value, high, turned).to(dtype), mask=mask)


@jit
def _weights(  # noqa: PLR0917
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    channel: tl.tensor,
    half: tl.tensor,
    is_query: tl.tensor,
    mask: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    there = channel < half
    q_low = tl.load(q_weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
    q_high = tl.load(q_weight_ptr + half + channel, mask=there, other=0.0).to(tl.float32)
    k_low = tl.load(k_weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
    k_high = tl.load(k_weight_ptr + half + channel, mask=there, other=0.0).to(tl.float32)
    return tl.where(is_query, q_low, k_low), tl.where(is_query, q_high, k_high)


@jit
def _backward_kernel(  # noqa: PLR0915, PLR0917
    qkv_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    grad_v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    q_batch: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    num_tokens: tl.tensor,
    length: tl.tensor,
    table_batch: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    half: tl.tensor,
    epsilon: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
) -> None:
    # With a weight gradient a program takes every num_programs-th token and keeps its share of it: the shares are
    # summed afterwards in a fixed order.
    program = tl.program_id(0)
    channel = tl.arange(0, HALF)[None, :]
    there = channel < half
    total = num_heads + 2 * num_kv_heads
    dtype = out_ptr.dtype.element_ty
    q_low_sum = tl.zeros((1, HALF), dtype=tl.float32)
    q_high_sum = tl.zeros((1, HALF), dtype=tl.float32)
    k_low_sum = tl.zeros((1, HALF), dtype=tl.float32)
    k_high_sum = tl.zeros((1, HALF), dtype=tl.float32)
    for index in range(program, num_tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        batch, position = token // length, token % length
        angle = batch * table_batch + position * half + channel
        cos = tl.load(cos_ptr + angle, mask=there, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=there, other=0.0)
        source, target = qkv_ptr + token * qkv_stride, out_ptr + token * total * 2 * half
        grad_q = grad_q_ptr + batch * q_batch + position * q_token
        grad_k = grad_k_ptr + batch * k_batch + position * k_token
        grad_v = grad_v_ptr + batch * v_batch + position * v_token
        for first in range(0, total, HEADS):
            head = first + tl.arange(0, HEADS)[:, None]
            is_query = (head < num_heads) & there
            is_key = (head >= num_heads) & (head < num_heads + num_kv_heads) & there
            is_value = (head >= num_heads + num_kv_heads) & (head < total) & there
            mask = (head < total) & there
            at = head * 2 * half + channel
            q_at = grad_q + head * q_head + channel
            k_at = grad_k + (head - num_heads) * k_head + channel
            v_at = grad_v + (head - num_heads - num_kv_heads) * v_head + channel
            grad_low = tl.load(q_at, mask=is_query, other=0.0).to(tl.float32)
            grad_low += tl.load(k_at, mask=is_key, other=0.0).to(tl.float32)
            grad_low += tl.load(v_at, mask=is_value, other=0.0).to(tl.float32)
            grad_high = tl.load(q_at + half, mask=is_query, other=0.0).to(tl.float32)
            grad_high += tl.load(k_at + half, mask=is_key, other=0.0).to(tl.float32)
            grad_high += tl.load(v_at + half, mask=is_value, other=0.0).to(tl.float32)
            low = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(source + at + half, mask=mask, other=0.0).to(tl.float32)
            rstd = 1.0 / tl.sqrt(tl.sum(low * low + high * high, axis=1)[:, None] / (2 * half) + epsilon)
            back_low, back_high = grad_low * cos + grad_high * sin, grad_high * cos - grad_low * sin
            if WEIGHT_GRAD:
                dw_low, dw_high = back_low * low * rstd, back_high * high * rstd
                q_low_sum += tl.sum(tl.where(is_query, dw_low, 0.0), axis=0)[None, :]
                q_high_sum += tl.sum(tl.where(is_query, dw_high, 0.0), axis=0)[None, :]
                k_low_sum += tl.sum(tl.where(is_key, dw_low, 0.0), axis=0)[None, :]
                k_high_sum += tl.sum(tl.where(is_key, dw_high, 0.0), axis=0)[None, :]
            weight_low, weight_high = _weights(q_weight_ptr, k_weight_ptr, channel, half, head < num_heads, mask)
            scaled_low, scaled_high = back_low * weight_low, back_high * weight_high
            dot = tl.sum(scaled_low * low + scaled_high * high, axis=1)[:, None] / (2 * half)
            cubed = rstd * rstd * rstd * dot
            out_low = tl.where(is_value, grad_low, rstd * scaled_low - cubed * low)
            out_high = tl.where(is_value, grad_high, rstd * scaled_high - cubed * high)
            tl.store(target + at, out_low.to(dtype), mask=mask)
            tl.store(target + at + half, out_high.to(dtype), mask=mask)
    if WEIGHT_GRAD:
        partial = partial_ptr + program.to(tl.int64) * 4 * half + channel
        tl.store(partial, q_low_sum, mask=there)
        tl.store(partial + half, q_high_sum, mask=there)
        tl.store(partial + 2 * half, k_low_sum, mask=there)
        tl.store(partial + 3 * half, k_high_sum, mask=there)


def _heads_a_time(sizes: Sequence[int], half: int) -> int:
    """Heads of a program at once: as many values as its threads hold without spilling."""
    return max(1, min(next_power_of_2(sum(sizes)), 2048 // next_power_of_2(half)))


def launch_forward(  # noqa: PLR0917 - as the autograd function has them
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float, sizes: Sequence[int]
) -> Tensor:
    """Returns q, k and v as one buffer like qkv [B, T, (H + 2K) · E], whose rows are contiguous."""
    batch, length, width = qkv.shape
    half = width // sum(sizes) // 2
    _check_tables(cos, sin, half)
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        _forward_kernel[(batch * length,)](
            qkv,
            out,
            q_weight,
            k_weight,
            cos,
            sin,
            qkv.stride(1),
            length,
            0 if cos.shape[0] == 1 else cos.stride(0),
            sizes[0],
            sizes[1],
            half,
            epsilon,
            HEADS=_heads_a_time(sizes, half),
            HALF=next_power_of_2(half),
            num_warps=4,
        )
    return out


def launch_backward(  # noqa: PLR0917 - as the autograd function has them
    grads: Sequence[Tensor],
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    epsilon: float,
    *,
    needs_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of qkv, and in fp32 of both weights (None where not needed), from those of q, k and v."""
    sizes = tuple(grad.shape[2] for grad in grads)
    batch, length, width = qkv.shape
    half = width // sum(sizes) // 2
    grads = [contiguous_channels(grad) for grad in grads]
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    programs = min(batch * length, num_programs(qkv, per_multiprocessor=8)) if needs_weights else batch * length
    partial = torch.zeros((programs if needs_weights else 1, 2, 2 * half), dtype=torch.float32, device=qkv.device)
    if out.numel():
        _backward_kernel[(programs,)](
            qkv,
            *grads,
            out,
            q_weight,
            k_weight,
            cos,
            sin,
            partial,
            qkv.stride(1),
            *(stride for grad in grads for stride in grad.stride()[:3]),
            batch * length,
            length,
            0 if cos.shape[0] == 1 else cos.stride(0),
            sizes[0],
            sizes[1],
            half,
            epsilon,
            HEADS=max(1, _heads_a_time(sizes, half) // 2),
            HALF=next_power_of_2(half),
            WEIGHT_GRAD=needs_weights,
            num_warps=4,
        )
    if not needs_weights:
        return out, None, None
    grad_q_weight, grad_k_weight = partial.sum(0)
    return out, grad_q_weight, grad_k_weight


def _check_tables(cos: Tensor, sin: Tensor, half: int) -> None:
    if cos.shape[-1] != half or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"tables of {tuple(cos.shape)} must be contiguous with {half} columns")


class _NormSplitAndRotate(torch.autograd.Function):
    """q, k and v are views of one new buffer, the gradient of qkv another."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        epsilon: float,
        sizes: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        """qkv: [B, T, (H + 2K) · E]."""
        qkv = qkv.contiguous()
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.epsilon = epsilon
        out = launch_forward(qkv, q_weight, k_weight, cos, sin, epsilon, sizes)
        return out.unflatten(-1, (sum(sizes), -1)).split(sizes, dim=2)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of qkv and of the weights."""
        needs_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        grad_qkv, grad_q, grad_k = launch_backward(
            grads, qkv, q_weight, k_weight, cos, sin, ctx.epsilon, needs_weights=needs_weights
        )
        grad_q = None if grad_q is None else grad_q.to(q_weight.dtype)
        grad_k = None if grad_k is None else grad_k.to(k_weight.dtype)
        return grad_qkv, grad_q, grad_k, None, None, None, None
