"""AdamW (arXiv:1711.05101) on weights and averages of any float type, computed in fp32, rounded stochastically to bf16.

    m = m + (1 − β₁)(g − m)        v = v + (1 − β₂)(g² − v)
    w = w (1 − η λ) − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

bf16 has 8 significant bits: a change below 1/512 of a value is lost when it is rounded to the nearest, and most steps
change a weight by less, as β₂ = 0.999 does v. Here the new value is rounded up or down with the
probabilities that make its expectation exact (Gupta et al. 2015, arXiv:1502.02551; for training in bf16 alone
arXiv:2010.06192): 16 random bits are added to the fp32 value's 32, and the lower 16 are cut off.

The bits are Philox's (Salmon et al. 2011; 4 x 32 bits, ten rounds), keyed by a seed and counted by position, step and
the parameter's number, so that a resumed run draws the same ones, and the reference those of the Triton kernel. One
call serves four values, 32 bits each: w takes the lower half, m the upper, v the upper half of the product with an odd
number, which is uniform and independent of the lower half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels.triton_support import check_implementation, constant, jit, jit_unspecialized, tl, triton

VALUES_A_CALL = 4
LANES = 1024
"""Lanes of a program: value `4 LANES p + LANES w + lane` of a parameter has word w of Philox call `LANES p + lane`."""
_GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio, odd
_MIX = constant(_GOLDEN)
_WORD = 0xFFFFFFFF
# Philox4x32's multipliers and the increments of its two key words (Salmon et al. 2011, table 2 and section 4.3).
_PHILOX_A, _PHILOX_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# Values that the reference works on at a time: its random bits take 64 bits a number.
_PIECE = 4 * LANES * 64


class AdamWStep(NamedTuple):
    """The numbers of one step: `step` counts from 1; gradients are multiplied by `gradient_scale` first."""

    step: int
    learning_rate: float
    first_beta: float
    second_beta: float
    epsilon: float
    weight_decay: float
    gradient_scale: float = 1.0

    @property
    def size(self) -> float:
        """η / (1 − β₁ᵗ)."""
        return self.learning_rate / (1.0 - self.first_beta**self.step)

    @property
    def inverse_root(self) -> float:
        """1 / √(1 − β₂ᵗ)."""
        return (1.0 - self.second_beta**self.step) ** -0.5

    @property
    def factors(self) -> tuple[float, ...]:
        """What kernels take: the gradients' scale, 1 − β₁, 1 − β₂, 1 − η λ, `size`, `inverse_root` and ε."""
        kept = 1.0 - self.learning_rate * self.weight_decay
        rates = 1.0 - self.first_beta, 1.0 - self.second_beta
        return self.gradient_scale, *rates, kept, self.size, self.inverse_root, self.epsilon


def adamw_(
    weight: Tensor,
    grad: Tensor,
    average: Tensor,
    square: Tensor,
    numbers: AdamWStep,
    *,
    seed: int,
    number: int,
    implementation: str = "reference",
) -> None:
    """Takes one step in place on `weight` and its two averages, all contiguous and of one shape; `grad` is only read.

    bf16 tensors are rounded stochastically, others to the nearest. `seed` (of 63 bits) and the parameter's `number`
    (of 32) choose the random bits. `implementation`: "reference" or "triton"; ValueError for an unknown one, and for
    tensors that are not contiguous.
    """
    is_triton = check_implementation(implementation)
    grad = grad.contiguous()
    if not all(tensor.is_contiguous() for tensor in (weight, average, square)):
        raise ValueError("AdamW's step needs contiguous weights and averages")
    if not weight.numel():
        return
    if is_triton:
        _launch(weight, grad, average, square, numbers, seed=seed, number=number)
        return
    flat = [tensor.view(-1) for tensor in (weight, grad, average, square)]
    for start in range(0, weight.numel(), _PIECE):
        _step_reference([one[start : start + _PIECE] for one in flat], numbers, seed=seed, number=number, start=start)


def _step_reference(pieces: list[Tensor], numbers: AdamWStep, *, seed: int, number: int, start: int) -> None:
    """The formula on flat pieces of (weight, gradient, averages) that begin at value `start`."""
    weight, grad, average, square = (one.float() for one in pieces)
    grad = grad * numbers.gradient_scale
    average = average + (grad - average) * (1.0 - numbers.first_beta)
    square = square + (grad * grad - square) * (1.0 - numbers.second_beta)
    denominator = square.sqrt() * numbers.inverse_root + numbers.epsilon
    weight = weight * (1.0 - numbers.learning_rate * numbers.weight_decay) - numbers.size * (average / denominator)
    bits: tuple[Tensor | None, ...] = (None, None, None)
    if any(pieces[index].dtype == torch.bfloat16 for index in (0, 2, 3)):
        bits = random_bits(weight.numel(), seed=seed, step=numbers.step, number=number, start=start)
        bits = tuple(one.to(weight.device) for one in bits if one is not None)
    for index, values, lot in zip((0, 2, 3), (weight, average, square), bits, strict=True):
        is_narrow = pieces[index].dtype == torch.bfloat16 and lot is not None
        pieces[index].copy_(round_stochastically(values, lot) if is_narrow and lot is not None else values)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Returns fp32 `values` in bf16, away from zero where the 16 `bits` (int32, 0 to 65,535) exceed what is cut off."""
    return ((values.view(torch.int32) + bits) & -65536).view(torch.float32).to(torch.bfloat16)


def random_bits(count: int, *, seed: int, step: int, number: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns 16 random bits for each of `count` values from value `start` on, as int32: for w, for m and for v.

    `start` is a multiple of 4 LANES.
    """
    calls = -(-count // (VALUES_A_CALL * LANES)) * LANES
    counter = torch.arange(calls, dtype=torch.int64) + start // VALUES_A_CALL
    words = torch.stack(_philox(counter, step, number, seed))  # [4, calls]
    word = words.view(VALUES_A_CALL, -1, LANES).transpose(0, 1).flatten()[:count]
    mixed = (word * _GOLDEN) & _WORD
    lots = word & 0xFFFF, word >> 16, mixed >> 16
    low, high, third = (lot.to(torch.int32) for lot in lots)
    return low, high, third


def _philox(counter: Tensor, step: int, number: int, seed: int) -> list[Tensor]:
    """Philox4x32-10 of counters (counter, step, number, 0) under the key `seed`: four words as int64 [N]."""
    c0, c1, c2, c3 = counter & _WORD, torch.full_like(counter, step), torch.full_like(counter, number), counter * 0
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high_b, low_b = _wide_product(c2, _PHILOX_B)
        high_a, low_a = _wide_product(c0, _PHILOX_A)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return [c0, c1, c2, c3]


def _wide_product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of 32-bit words times a 32-bit factor, in int64 without overflow."""
    low = word * (factor & 0xFFFF)  # below 2^48
    high = word * (factor >> 16) + (low >> 16)  # below 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


@jit_unspecialized("step", "number", "seed")
def _step_kernel(  # noqa: PLR0917
    weight_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    average_ptr: tl.tensor,
    square_ptr: tl.tensor,
    num_values: tl.tensor,
    step: tl.tensor,
    number: tl.tensor,
    seed: tl.tensor,
    grad_scale: tl.tensor,
    first_weight: tl.tensor,
    second_weight: tl.tensor,
    kept: tl.tensor,
    size: tl.tensor,
    inverse_root: tl.tensor,
    epsilon: tl.tensor,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)
    counter = (program * LANES + lane).to(tl.uint32)
    zero = counter * 0
    words = tl.philox(seed, counter, zero + step.to(tl.uint32), zero + number.to(tl.uint32), zero)
    first = program.to(tl.int64) * (4 * LANES) + lane
    # All is read before anything is written: a read would otherwise wait for the writes before it (2^28 bf16 weights on
    # an H200: 3.67 TB/s with four warps; so 3.99, and 4.16 with eight).
    w0, g0, m0, v0 = _read(weight_ptr, grad_ptr, average_ptr, square_ptr, first, num_values)
    w1, g1, m1, v1 = _read(weight_ptr, grad_ptr, average_ptr, square_ptr, first + LANES, num_values)
    w2, g2, m2, v2 = _read(weight_ptr, grad_ptr, average_ptr, square_ptr, first + 2 * LANES, num_values)
    w3, g3, m3, v3 = _read(weight_ptr, grad_ptr, average_ptr, square_ptr, first + 3 * LANES, num_values)
    weights, grads = (w0, w1, w2, w3), (g0, g1, g2, g3)
    averages, squares = (m0, m1, m2, m3), (v0, v1, v2, v3)
    for word in tl.static_range(4):
        place = first + word * LANES
        mask = place < num_values
        weight, average, square = (
            weights[word].to(tl.float32),
            averages[word].to(tl.float32),
            squares[word].to(tl.float32),
        )
        grad = grads[word].to(tl.float32) * grad_scale
        average += (grad - average) * first_weight
        square += (grad * grad - square) * second_weight
        weight = weight * kept - size * (average / (tl.sqrt(square) * inverse_root + epsilon))
        if ROUNDS:
            bits = words[word]
            weight = _rounded(weight, bits & 0xFFFF)
            average = _rounded(average, bits >> 16)
            square = _rounded(square, (bits * _MIX) >> 16)
        tl.store(weight_ptr + place, weight.to(weight_ptr.dtype.element_ty), mask=mask)
        tl.store(average_ptr + place, average.to(average_ptr.dtype.element_ty), mask=mask)
        tl.store(square_ptr + place, square.to(square_ptr.dtype.element_ty), mask=mask)


@jit
def _read(  # noqa: PLR0917
    weight_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    average_ptr: tl.tensor,
    square_ptr: tl.tensor,
    place: tl.tensor,
    num_values: tl.tensor,
) -> tuple:
    mask = place < num_values
    weight = tl.load(weight_ptr + place, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0)
    average = tl.load(average_ptr + place, mask=mask, other=0.0)
    square = tl.load(square_ptr + place, mask=mask, other=0.0)
    return weight, grad, average, square


@jit
def _rounded(value: tl.tensor, bits: tl.tensor) -> tl.tensor:
    whole = value.to(tl.uint32, bitcast=True) + bits
    return (whole & 0xFFFF0000).to(tl.float32, bitcast=True)


def _launch(
    weight: Tensor, grad: Tensor, average: Tensor, square: Tensor, numbers: AdamWStep, *, seed: int, number: int
) -> None:
    dtypes = {weight.dtype, average.dtype, square.dtype}
    if len(dtypes) > 1:
        raise ValueError(f"AdamW's kernel takes weight and averages of one type, not {dtypes}")
    # Lanes are part of the counting: as many for every size.
    _step_kernel[(triton.cdiv(weight.numel(), VALUES_A_CALL * LANES),)](
        weight,
        grad,
        average,
        square,
        weight.numel(),
        numbers.step,
        number,
        seed,
        *numbers.factors,
        LANES=LANES,
        ROUNDS=weight.dtype == torch.bfloat16,
        num_warps=8,
    )
