"""Rotary position embedding (RoFormer, arXiv:2104.09864), half-split as in Llama's Hugging Face weights.

    θ_i = theta^(−2i / E)      a = position · θ      [q1, q2] = halves of a head's channels
    rotate(q) = [q1 · cos a − q2 · sin a,  q2 · cos a + q1 · sin a]

The backward is the rotation by −a. Tables are fp32 and hold E/2 columns: both halves turn by the same angles.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def frequencies(
    dim: int, theta: float, *, kind: str = "default", length: int = 0, **scaling: Any
) -> tuple[Tensor, float]:
    """The `dim / 2` angles per position as fp32 on the CPU, and the factor that multiplies cosines and sines.

    `kind` and `scaling` are those of the architecture's rope scaling; `length` is the document's length in tokens, and
    only "dynamic" looks at it. The order of operations is that of transformers 5.24's `modeling_rope_utils.py`, so that
    the fp32 results are the same bit for bit. Raises ValueError for an unknown kind.
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


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula for x [B, T, H, E]; cos and sin [1 or B, T, E/2]; the oracle of the implementations below."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Returns q [B, T, H, E] and k [B, T, K, E] turned by the angles of cos and sin [1 or B, T, E/2], fp32.

    Raises ValueError for an unknown implementation.
    """
    if implementation != "reference":
        raise ValueError(f"rotate has no implementation {implementation!r}; known: reference")
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)


def split_and_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int, implementation: str = "reference"
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a fused projection and turns its queries and keys: one pass forward, one backward.

    qkv: [B, T, (H + 2K) · E]; cos, sin: [1 or B, T, E/2], fp32. Returns q [B, T, H, E], k and v [B, T, K, E].
    Raises ValueError for an unknown implementation.
    """
    if implementation != "reference":
        raise ValueError(f"split_and_rotate has no implementation {implementation!r}; known: reference")
    return _SplitAndRotate.apply(qkv, cos, sin, num_heads, num_kv_heads)


class _SplitAndRotate(torch.autograd.Function):
    """Saves the tables only; the backward writes one gradient of qkv instead of padding and adding three."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv: [B, T, (H + 2K) · E]."""
        ctx.save_for_backward(cos, sin)
        ctx.sizes = (num_heads, num_kv_heads, num_kv_heads)
        heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        q, k, v = heads.split(ctx.sizes, dim=2)
        new_q, new_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        _turn(q, cos, sin, new_q)
        _turn(k, cos, sin, new_k)
        # A copy, so that qkv itself is not kept alive by a third of it.
        return new_q, new_k, v.contiguous()

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradient of qkv."""
        grad_q, grad_k, grad_v = grads
        cos, sin = ctx.saved_tensors
        batch, length, _, head_dim = grad_q.shape
        grad = grad_q.new_empty(batch, length, sum(ctx.sizes), head_dim)
        q, k, v = grad.split(ctx.sizes, dim=2)
        _turn(grad_q, cos, -sin, q)
        _turn(grad_k, cos, -sin, k)
        v.copy_(grad_v)
        return grad.flatten(2), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Writes x [B, T, H, E], turned, into `out`, which is another tensor."""
    if x.dtype != torch.float32:
        out.copy_(rotate_reference(x, cos, sin))
        return
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
