"""Rotary position embedding (RoFormer, arXiv:2104.09864) of the first R channels of each head; the rest stay.

    θ_i = theta^(−2i / R)      a = position · θ      [q1, q2] = halves of the R channels
    rotate(q) = [q1 · cos a − q2 · sin a,  q2 · cos a + q1 · sin a,  rest]

Halves are what Llama's Hugging Face weights have. "Interleaved" weights turn neighbours: q1 are the even channels, q2
the odd ones; the result comes out as halves all the same, for queries and keys alike, whose products do not see the
order. The backward is the rotation by −a. Tables are fp32 and hold R/2 columns: both partners turn by the same angles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.triton_support import check_implementation, contiguous_channels, jit, next_power_of_2, tl


def frequencies(
    dim: int, theta: float, *, kind: str = "default", length: int = 0, **scaling: Any
) -> tuple[Tensor, float]:
    """The `dim / 2` angles per position as fp32 on the CPU, and the factor that multiplies cosines and sines.

    `kind` and `scaling` are those of the architecture's rope scaling; `length` is the document's length in tokens, and
    only "dynamic" and "longrope" look at it. The order of operations is that of transformers 5.24's
    `modeling_rope_utils.py`, so that the fp32 results are the same bit for bit. Raises ValueError for an unknown kind.
    """
    base: Tensor | float = theta
    if kind == "dynamic":
        base = _dynamic_theta(dim, theta, length, **scaling)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    periods = base**exponents
    inverse = 1.0 / periods
    match kind:
        case "default" | "dynamic":
            return inverse, 1.0
        case "linear":
            return inverse / scaling["factor"], 1.0
        case "llama3":
            return _llama3(inverse, **scaling), 1.0
        case "longrope":
            exceeds = length > scaling["original_max_positions"]
            factors = torch.tensor(scaling["long_factors" if exceeds else "short_factors"], dtype=torch.float32)
            return 1.0 / (factors * periods), scaling["attention_factor"]
        case "yarn":
            return _yarn(periods, theta, **scaling), scaling["attention_factor"]
    raise ValueError(f"unknown rope scaling {kind!r}")


def _dynamic_theta(
    dim: int, theta: float, length: int, *, factor: float, original_max_positions: int
) -> Tensor | float:
    """Theta stretched so that the lowest frequency still spans `length` ("dynamic NTK", by /u/emozilla)."""
    if length <= original_max_positions:
        return theta
    stretch = (factor * torch.tensor(length) / original_max_positions) - (factor - 1)
    return theta * stretch ** (dim / (dim - 2))


def _llama3(
    inverse: Tensor,
    *,
    factor: float,
    low_frequency_factor: float,
    high_frequency_factor: float,
    original_max_positions: int,
) -> Tensor:
    """Wavelengths beyond the original context are stretched by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / inverse
    longest, shortest = original_max_positions / low_frequency_factor, original_max_positions / high_frequency_factor
    ramp = (original_max_positions / wavelength - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)
    blended = (1 - ramp) * inverse / factor + ramp * inverse
    outer = torch.where(wavelength > longest, inverse / factor, inverse)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blended, outer)


def _yarn(
    periods: Tensor,
    theta: float,
    *,
    factor: float,
    original_max_positions: int,
    attention_factor: float,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    """Interpolated where a channel turns seldom, kept where it turns often (arXiv:2309.00071, section 3.2)."""
    del attention_factor  # the caller multiplies cosines and sines with it
    half = periods.numel()

    def channel_of(rotations: float) -> float:
        """The channel that turns `rotations` times within the original context."""
        return 2 * half * math.log(original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_of(beta_fast), channel_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # keeps the ramp's slope finite
    kept = 1 - ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (factor * periods)) * (1 - kept) + (1.0 / periods) * kept


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """The formula for x [B, T, H, E]; cos and sin [1 or B, T, R/2]; the oracle of the implementations below."""
    dim = 2 * cos.shape[-1]
    turning = x[..., :dim].to(torch.promote_types(x.dtype, torch.float32))
    first, second = _partners(turning, interleaved=interleaved)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)


def _partners(x: Tensor, *, interleaved: bool) -> tuple[Tensor, ...]:
    """The channels of x [..., R] that turn together, as two views [..., R/2]."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Returns q [B, T, H, E] and k [B, T, K, E] turned by the angles of cos and sin [1 or B, T, R/2], fp32.

    `implementation`: "reference" or "triton"; ValueError for an unknown one.
    """
    if check_implementation(implementation):
        return _RotateTriton.apply(q, k, cos, sin, interleaved)
    return (
        rotate_reference(q, cos, sin, interleaved=interleaved),
        rotate_reference(k, cos, sin, interleaved=interleaved),
    )


def split_and_rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    implementation: str = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a fused projection and turns its queries and keys: one pass forward, one backward.

    qkv: [B, T, (H + 2K) · E]; cos, sin: [1 or B, T, R/2], fp32. Returns q [B, T, H, E], k and v [B, T, K, E].
    `implementation`: "reference" or "triton" (whose results are views of one buffer); ValueError for an unknown one.
    """
    function = _SplitAndRotateTriton if check_implementation(implementation) else _SplitAndRotate
    return function.apply(qkv, cos, sin, num_heads, num_kv_heads, interleaved)


def split_and_rotate_backward(
    grads: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    implementation: str = "reference",
) -> Tensor:
    """Returns the gradient of qkv [B, T, (H + 2K) · E] from those of q, k and v, as `split_and_rotate` made them.

    For callers that write their own backward; the arguments are those of `split_and_rotate`.
    """
    sizes = tuple(grad.shape[2] for grad in grads)
    batch, length, _, head_dim = grads[0].shape
    grad_qkv = grads[0].new_empty(batch, length, sum(sizes) * head_dim)
    q, k, v = _heads_of(grad_qkv, sizes)
    if check_implementation(implementation):
        sources = tuple(map(contiguous_channels, grads))
        _rotate_triton(sources, (q, k, v), cos, sin, interleaved=interleaved, backward=True)
        return grad_qkv
    _turn(grads[0], cos, -sin, q, to_pairs=interleaved)
    _turn(grads[1], cos, -sin, k, to_pairs=interleaved)
    v.copy_(grads[2])
    return grad_qkv


class _SplitAndRotate(torch.autograd.Function):
    """Saves the tables only; the backward writes one gradient of qkv instead of padding and adding three."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv: [B, T, (H + 2K) · E]."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        ctx.sizes = (num_heads, num_kv_heads, num_kv_heads)
        heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        q, k, v = heads.split(ctx.sizes, dim=2)
        new_q, new_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        _turn(q, cos, sin, new_q, from_pairs=interleaved)
        _turn(k, cos, sin, new_k, from_pairs=interleaved)
        # A copy, so that qkv itself is not kept alive by a third of it.
        return new_q, new_k, v.contiguous()

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradient of qkv."""
        grad_qkv = split_and_rotate_backward(grads, *ctx.saved_tensors, interleaved=ctx.interleaved)
        return grad_qkv, None, None, None, None, None


def _turn(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, from_pairs: bool = False, to_pairs: bool = False
) -> None:
    """Writes x [B, T, H, E], turned, into `out`, which is another tensor; partners are halves or neighbours in each."""
    dim = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = _partners(x[..., :dim], interleaved=from_pairs)
    out_first, out_second = _partners(out[..., :dim], interleaved=to_pairs)
    if x.dtype != torch.float32:
        first, second = first.float(), second.float()
        out_first.copy_(first * cos - second * sin)
        out_second.copy_(second * cos + first * sin)
    else:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    if dim < x.shape[-1]:
        out[..., dim:] = x[..., dim:]


@jit
def _partner_channels(channel: tl.tensor, half: tl.tensor, PAIRS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    if PAIRS:
        first, second = 2 * channel, 2 * channel + 1
    else:
        first, second = channel, half + channel
    return first, second


@jit
def _turn_heads(  # noqa: PLR0917
    source: tl.tensor,
    target: tl.tensor,
    source_head: tl.tensor,
    target_head: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    num_heads: tl.tensor,
    half: tl.tensor,
    rest: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    FROM_PAIRS: tl.constexpr,
    TO_PAIRS: tl.constexpr,
) -> None:
    channel = tl.arange(0, HALF)[None, :]
    dtype = target.dtype.element_ty
    for first_head in range(0, num_heads, HEADS):
        head = first_head + tl.arange(0, HEADS)[:, None]
        mask = (head < num_heads) & (channel < half)
        first, second = _partner_channels(channel, half, FROM_PAIRS)
        low = tl.load(source + head * source_head + first, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + head * source_head + second, mask=mask, other=0.0).to(tl.float32)
        first, second = _partner_channels(channel, half, TO_PAIRS)
        tl.store(target + head * target_head + first, (low * cos - high * sin).to(dtype), mask=mask)
        tl.store(target + head * target_head + second, (high * cos + low * sin).to(dtype), mask=mask)
        if REST > 0:
            after = tl.arange(0, REST)[None, :]
            there = (head < num_heads) & (after < rest)
            kept = tl.load(source + head * source_head + 2 * half + after, mask=there)
            tl.store(target + head * target_head + 2 * half + after, kept, mask=there)


@jit
def _rotate_kernel(  # noqa: PLR0917
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    new_q_ptr: tl.tensor,
    new_k_ptr: tl.tensor,
    new_v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_batch: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    new_q_token: tl.tensor,
    new_q_head: tl.tensor,
    new_k_token: tl.tensor,
    new_k_head: tl.tensor,
    new_v_token: tl.tensor,
    new_v_head: tl.tensor,
    length: tl.tensor,
    table_batch: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    half: tl.tensor,
    rest: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    CHANNELS: tl.constexpr,
    FROM_PAIRS: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    BACKWARD: tl.constexpr,
    WITH_VALUES: tl.constexpr,
) -> None:
    # One token a program: its angles are loaded once for all its heads.
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    channel = tl.arange(0, HALF)[None, :]
    angle = batch * table_batch + position * half + channel
    cos = tl.load(cos_ptr + angle, mask=channel < half, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=channel < half, other=0.0)
    if BACKWARD:
        sin = -sin
    q, k = q_ptr + batch * q_batch + position * q_token, k_ptr + batch * k_batch + position * k_token
    new_q, new_k = new_q_ptr + token * new_q_token, new_k_ptr + token * new_k_token
    _turn_heads(q, new_q, q_head, new_q_head, cos, sin, num_heads, half, rest, HEADS, HALF, REST, FROM_PAIRS, TO_PAIRS)
    _turn_heads(
        k, new_k, k_head, new_k_head, cos, sin, num_kv_heads, half, rest, HEADS, HALF, REST, FROM_PAIRS, TO_PAIRS
    )
    if WITH_VALUES:
        v, new_v = v_ptr + batch * v_batch + position * v_token, new_v_ptr + token * new_v_token
        all_channels = tl.arange(0, CHANNELS)[None, :]
        for first_head in range(0, num_kv_heads, HEADS):
            head = first_head + tl.arange(0, HEADS)[:, None]
            mask = (head < num_kv_heads) & (all_channels < 2 * half + rest)
            values = tl.load(v + head * v_head + all_channels, mask=mask)
            tl.store(new_v + head * new_v_head + all_channels, values, mask=mask)


def _rotate_triton(
    sources: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    backward: bool,
) -> None:
    """Writes q, k and, where given, unturned v [B, T, heads, E] of `sources` into the like of `targets`, in one launch.

    Sources may be any views whose last dimension is contiguous; so may targets whose rows follow each other evenly.
    """
    q, k, v = (*sources, sources[1])[:3]
    new_q, new_k, new_v = (*targets, targets[1])[:3]
    batch, length, num_heads, head_dim = q.shape
    half = cos.shape[-1]
    rest = head_dim - 2 * half
    if rest < 0 or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"tables of {tuple(cos.shape)} must be contiguous with at most {head_dim // 2} columns")
    if batch * length == 0:
        return
    _rotate_kernel[(batch * length,)](
        q,
        k,
        v,
        new_q,
        new_k,
        new_v,
        cos,
        sin,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *new_q.stride()[1:3],
        *new_k.stride()[1:3],
        *new_v.stride()[1:3],
        length,
        0 if cos.shape[0] == 1 else cos.stride(0),
        num_heads,
        k.shape[2],
        half,
        rest,
        HEADS=min(32, next_power_of_2(num_heads)),
        HALF=next_power_of_2(half),
        REST=next_power_of_2(rest) if rest else 0,
        CHANNELS=next_power_of_2(head_dim),
        # Neighbours are turned into halves, and on the way back halves into neighbours.
        FROM_PAIRS=interleaved and not backward,
        TO_PAIRS=interleaved and backward,
        BACKWARD=backward,
        WITH_VALUES=len(sources) == 3,
        num_warps=4,
    )


def _heads_of(qkv: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Views [B, T, heads, E] of a fused tensor [B, T, sum(heads) · E]."""
    return qkv.unflatten(-1, (sum(sizes), -1)).split(sizes, dim=2)


class _SplitAndRotateTriton(torch.autograd.Function):
    """q, k and v are views of one new buffer, the gradient of qkv another: each direction one launch."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
    ) -> tuple[Tensor, ...]:
        """qkv: [B, T, (H + 2K) · E]."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        ctx.sizes = (num_heads, num_kv_heads, num_kv_heads)
        targets = _heads_of(torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), ctx.sizes)
        sources = tuple(map(contiguous_channels, _heads_of(qkv, ctx.sizes)))
        _rotate_triton(sources, targets, cos, sin, interleaved=interleaved, backward=False)
        return targets

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradient of qkv."""
        tables, interleaved = ctx.saved_tensors, ctx.interleaved
        grad_qkv = split_and_rotate_backward(grads, *tables, interleaved=interleaved, implementation="triton")
        return grad_qkv, None, None, None, None, None


class _RotateTriton(torch.autograd.Function):
    """q and k in one launch; saves the tables only."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, ...]:
        """q: [B, T, H, E], k: [B, T, K, E]."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        turned = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        sources = contiguous_channels(q), contiguous_channels(k)
        _rotate_triton(sources, turned, cos, sin, interleaved=interleaved, backward=False)
        return turned

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of q and k."""
        turned = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in grads)
        sources = tuple(map(contiguous_channels, grads))
        _rotate_triton(sources, turned, *ctx.saved_tensors, interleaved=ctx.interleaved, backward=True)
        return (*turned, None, None, None)
