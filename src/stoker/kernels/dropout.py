"""Dropout whose mask is made from a seed, so that a backward makes it again instead of keeping it.

    y = x · m / (1 − p)        m_ij = 0 with probability p, else 1

The mask depends on the seed and the shape alone, within one implementation: the reference draws it with torch's
generator, the Triton kernel with Philox (Salmon et al. 2011), counted by row and column. A Philox call gives 128 random
bits, here for eight values of 16 bits each, so that p is rounded to a multiple of 1/65,536 (and the scale fits it).
Dropout is linear in x, hence its own derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.kernels.triton_support import check_implementation, jit_unspecialized, next_power_of_2, tl, triton

_STEPS = 1 << 16
_VALUES_A_CALL = 8
_MAX_LANES = 512


def draw_seed() -> int:
    """Returns a seed from torch's CPU generator, whose state checkpoints and recomputation restore."""
    return int(torch.randint(2**62, ()).item())


def drop(
    x: Tensor,
    *,
    rate: float,
    seed: int,
    first_row: int = 0,
    onto: Tensor | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns x [N, C] with a share `rate` of its values zeroed and the others divided by 1 - rate.

    `first_row`: where x begins in a longer tensor that is taken piece by piece. With `onto` [N, C] the result is added
    to it in place. A rate of 0 without `onto` returns `x` itself.
    `implementation`: "reference" or "triton"; ValueError for an unknown one and for a rate outside [0, 1).
    """
    is_triton = check_implementation(implementation)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate = {rate} is not in [0, 1)")
    if rate == 0.0:
        return x if onto is None else onto.add_(x)
    if not is_triton:
        dropped = drop_reference(x, rate=rate, seed=seed + first_row)
        return dropped if onto is None else onto.add_(dropped)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if onto is None else onto
    if x.numel():
        _launch(x, out, rate=rate, seed=seed, first_row=first_row, adds=onto is not None)
    return out


def drop_reference(x: Tensor, *, rate: float, seed: int) -> Tensor:
    """The formula, with a mask of torch's generator on the device of `x`."""
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - rate, generator=generator)
    return kept.mul_(1 / (1 - rate)).mul_(x)


@jit_unspecialized("first_row", "seed")
def _drop_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    num_columns: tl.tensor,
    first_row: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    LANES: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, LANES)
    first = block * (8 * LANES)
    counter = (block * LANES + lane).to(tl.uint32)
    zero = counter * 0
    words = tl.philox(seed, counter, zero + (first_row + row).to(tl.uint32), zero, zero)
    x_row, out_row = x_ptr + row.to(tl.int64) * x_stride, out_ptr + row.to(tl.int64) * out_stride
    for word in tl.static_range(4):
        for half in tl.static_range(2):
            column = first + (2 * word + half) * LANES + lane
            mask = column < num_columns
            bits = ((words[word] >> (16 * half)) & 0xFFFF).to(tl.int32)
            value = tl.load(x_row + column, mask=mask, other=0.0).to(tl.float32)
            value = tl.where(bits >= threshold, value * scale, 0.0)
            if ADDS:
                value += tl.load(out_row + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_row + column, value.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, out: Tensor, *, rate: float, seed: int, first_row: int, adds: bool) -> None:
    num_rows, num_columns = x.shape
    threshold = min(_STEPS - 1, round(rate * _STEPS))
    lanes = min(_MAX_LANES, max(16, next_power_of_2(triton.cdiv(num_columns, _VALUES_A_CALL))))
    _drop_kernel[(num_rows, triton.cdiv(num_columns, _VALUES_A_CALL * lanes))](
        x,
        out,
        x.stride(0),
        out.stride(0),
        num_columns,
        first_row,
        seed,
        threshold,
        _STEPS / (_STEPS - threshold),
        LANES=lanes,
        ADDS=adds,
        num_warps=4,
    )
