"""The rotation's backward with its result left in fp8 as well, for the product that reads it so.

The formulas are those of `kernels/rope.py`, backward, and the rounding is that of `kernels/fp8.py`, of the very values
that are stored times a factor of each column. A program takes a token, all of whose heads stay in registers until the
scale of its row is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stoker.kernels.fp8 import Rounded, scale_of, to_e4m3
from stoker.kernels.triton_support import (
    check_implementation,
    contiguous_channels,
    jit,
    next_power_of_2,
    tl,
)

MAX_WIDTH = 16384
"""Values of a row, padded, above which they no longer fit in the registers of a program."""


def takes(num_heads: int, num_kv_heads: int, head_dim: int, rotated: int) -> bool:
    """Whether the kernel runs this: heads that are turned whole (`rotated` channels), and not too many of them."""
    padded = next_power_of_2(num_heads) + 2 * next_power_of_2(num_kv_heads)
    return rotated == head_dim and padded * next_power_of_2(head_dim) <= MAX_WIDTH


def rotate_back_rounded(
    grads: Sequence[Tensor], cos: Tensor, sin: Tensor, rounded: Rounded, factor: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Returns `rope.split_and_rotate_backward` of the same arguments, [B, T, (H + 2K) · E].

    `rounded` takes its rows times `factor`, fp32 [(H + 2K) · E], in fp8. By Triton alone. ValueError without Triton,
    or for what `takes` refuses.
    """
    check_implementation("triton")
    q, k, v = map(contiguous_channels, grads)
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    if not takes(num_heads, num_kv_heads, head_dim, 2 * cos.shape[-1]):
        raise ValueError(f"{num_heads} and {num_kv_heads} heads of {head_dim} channels, {2 * cos.shape[-1]} turned")
    out = torch.empty((batch, length, (num_heads + 2 * num_kv_heads) * head_dim), dtype=q.dtype, device=q.device)
    if out.numel():
        _rotate_back_kernel[(batch * length,)](
            q,
            k,
            v,
            out,
            cos,
            sin,
            factor,
            *rounded,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            length,
            0 if cos.shape[0] == 1 else cos.stride(0),
            num_heads,
            num_kv_heads,
            head_dim // 2,
            HEADS=next_power_of_2(num_heads),
            KV_HEADS=next_power_of_2(num_kv_heads),
            HALF=next_power_of_2(head_dim // 2),
            PAIRS=interleaved,
            num_warps=8,
        )
    return out


@jit
def _places(
    num_heads: tl.tensor, half: tl.tensor, HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where the partners of each head are in its result, and which are there."""
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    first = head * 2 * half + (2 * channel if PAIRS else channel)
    return first, first + (1 if PAIRS else half), (head < num_heads) & (channel < half)


@jit
def _load_heads(  # noqa: PLR0917
    source: tl.tensor,
    head_stride: tl.tensor,
    half: tl.tensor,
    mask: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both partners of each head, fp32."""
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    first = source + head * head_stride + (2 * channel if PAIRS else channel)
    low = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    return low, tl.load(first + (1 if PAIRS else half), mask=mask, other=0.0).to(tl.float32)


@jit
def _store_heads(  # noqa: PLR0917
    low: tl.tensor,
    high: tl.tensor,
    out: tl.tensor,
    factor_ptr: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mask: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Stores both; returns what was stored times the factor, and the largest magnitude of it."""
    low, high = low.to(out.dtype.element_ty), high.to(out.dtype.element_ty)
    tl.store(out + first, low, mask=mask)
    tl.store(out + second, high, mask=mask)
    low = low.to(tl.float32) * tl.load(factor_ptr + first, mask=mask, other=0.0)
    high = high.to(tl.float32) * tl.load(factor_ptr + second, mask=mask, other=0.0)
    return low, high, tl.max(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1), axis=0)


@jit
def _store_rounded_heads(  # noqa: PLR0917
    low: tl.tensor,
    high: tl.tensor,
    scale: tl.tensor,
    rounded: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mask: tl.tensor,
) -> None:
    tl.store(rounded + first, to_e4m3(low, scale).to(rounded.dtype.element_ty), mask=mask)
    tl.store(rounded + second, to_e4m3(high, scale).to(rounded.dtype.element_ty), mask=mask)


@jit
def _rotate_back_kernel(  # noqa: PLR0917
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    rounded_ptr: tl.tensor,
    rounded_scale_ptr: tl.tensor,
    q_batch: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    length: tl.tensor,
    table_batch: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    half: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    channel = tl.arange(0, HALF)[None, :]
    angle = batch * table_batch + position * half + channel
    cos = tl.load(cos_ptr + angle, mask=channel < half, other=0.0)
    # Turned by -a, in the order of the other rotation, for the compiler to contract sums alike.
    sin = -tl.load(sin_ptr + angle, mask=channel < half, other=0.0)
    q_first, q_second, in_q = _places(num_heads, half, HEADS, HALF, PAIRS)
    first, second, inside = _places(num_kv_heads, half, KV_HEADS, HALF, PAIRS)
    # Gradients come as halves; values were never turned, and stay in their order.
    q_low, q_high = _load_heads(q_ptr + batch * q_batch + position * q_token, q_head, half, in_q, HEADS, HALF, False)
    k_low, k_high = _load_heads(
        k_ptr + batch * k_batch + position * k_token, k_head, half, inside, KV_HEADS, HALF, False
    )
    v_low, v_high = _load_heads(
        v_ptr + batch * v_batch + position * v_token, v_head, half, inside, KV_HEADS, HALF, PAIRS
    )
    width = (num_heads + 2 * num_kv_heads) * 2 * half
    to_k = num_heads * 2 * half
    to_v = to_k + num_kv_heads * 2 * half
    out, rounded = out_ptr + token * width, rounded_ptr + token * width
    q_low, q_high, highest = _store_heads(
        q_low * cos - q_high * sin, q_high * cos + q_low * sin, out, factor_ptr, q_first, q_second, in_q
    )
    k_low, k_high, highest_k = _store_heads(
        k_low * cos - k_high * sin, k_high * cos + k_low * sin, out + to_k, factor_ptr + to_k, first, second, inside
    )
    v_low, v_high, highest_v = _store_heads(v_low, v_high, out + to_v, factor_ptr + to_v, first, second, inside)
    scale = scale_of(tl.maximum(highest, tl.maximum(highest_k, highest_v)))
    tl.store(rounded_scale_ptr + token, scale)
    _store_rounded_heads(q_low, q_high, scale, rounded, q_first, q_second, in_q)
    _store_rounded_heads(k_low, k_high, scale, rounded + to_k, first, second, inside)
    _store_rounded_heads(v_low, v_high, scale, rounded + to_v, first, second, inside)
