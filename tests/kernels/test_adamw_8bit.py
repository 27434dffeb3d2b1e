"""AdamW's step on averages of 8 bits: the code, the kernel beside its reference, and what both make of AdamW."""

import pytest
import torch

from stoker.kernels.adamw import AdamWStep
from stoker.kernels.adamw_8bit import (
    BLOCK_SIZE,
    Average,
    adamw_8bit_,
    codes,
    dequantize,
    quantize,
    scale_shape,
)

NUMBERS = AdamWStep(3, learning_rate=1e-2, first_beta=0.9, second_beta=0.99, epsilon=1e-8, weight_decay=0.1)
SHAPES = [(1,), (3000,), (5, 8), (3, 256), (2, 3, 300), (7, 1030), (0, 512)]


def _tensors(draw, shape):
    """A weight, a gradient, and averages whose sizes in one block differ by many decades."""
    weight, grad, average, square = (draw(*shape).float() for _ in range(4))
    exponents = draw(*shape).float()
    return (
        weight,
        grad,
        quantize(average * 10**exponents, signed=True),
        quantize(square.abs() * 10**exponents, signed=False),
    )


def _stepped(tensors, numbers=NUMBERS, **options):
    weight, grad, average, square = tensors
    weight, average, square = weight.clone(), Average(*map(torch.clone, average)), Average(*map(torch.clone, square))
    adamw_8bit_(weight, grad, average, square, numbers, **options)
    return weight, average, square


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_steps_and_rounds_as_the_reference_does(draw, shape):
    tensors = _tensors(draw, shape)
    numbers = NUMBERS._replace(gradient_scale=0.3)
    weight, *averages = _stepped(tensors, numbers, implementation="triton")
    expected, *others = _stepped(tensors, numbers)
    # A few units in the last place: d(a) is computed in the kernel and looked up in the reference.
    torch.testing.assert_close(weight, expected, rtol=2e-6, atol=1e-6)
    for ours, theirs in zip(averages, others, strict=True):
        torch.testing.assert_close(ours.scale, theirs.scale, rtol=2e-6, atol=0.0)
        # A value between two codes may go to either when its last bit differs, to no other.
        steps = (ours.code.int() - theirs.code.int()).abs()
        assert (steps > 0).sum() <= 1 + 1e-3 * steps.numel()
        assert not steps.numel() or steps.max() <= 1


def test_codes_are_those_of_bitsandbytes_but_for_the_largest_of_the_signed_ones():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(codes(signed=False), functional.create_dynamic_map(signed=False), rtol=1e-6, atol=0)
    theirs = functional.create_dynamic_map(signed=True)
    sizes = codes(signed=True)
    torch.testing.assert_close(sizes[:127], theirs[127:254], rtol=1e-6, atol=0)
    torch.testing.assert_close(-sizes[1:127].flip(0), theirs[1:127], rtol=1e-6, atol=0)
    assert sizes[127] == theirs[255] == 1.0


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_rounded_to_the_nearest_code(draw, signed):
    values = draw(3, 1000).float() * 10 ** draw(3, 1000).float()
    values = values if signed else values.abs()
    average = quantize(values, signed=signed)
    found = dequantize(average)
    scale = average.scale.repeat_interleave(BLOCK_SIZE, -1)[:, :1000]
    table = codes(signed=signed).to(values.device)
    table = torch.cat((-table[1:].flip(0), table)) if signed else table[1:]  # v does not become zero
    nearest = (table - (values / scale).unsqueeze(-1)).abs().min(-1).values * scale
    torch.testing.assert_close((found - values).abs(), nearest, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_twice_changes_nothing_and_keeps_the_largest_of_a_block(draw, signed):
    values = draw(4, 700).float()
    values[0, 5] = -9.0  # the largest is negative
    values = values if signed else values.abs()
    once = quantize(values, signed=signed)
    found = dequantize(once)
    assert found[0, 5] == values[0, 5]
    again = quantize(found, signed=signed)
    assert torch.equal(again.code, once.code)
    assert torch.equal(again.scale, once.scale)


def test_a_square_that_is_not_zero_never_becomes_zero():
    values = torch.tensor([[1.0, 1e-12, 0.0]])
    assert (dequantize(quantize(values, signed=False)) > 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_blocks_of_zeros_stay_zeros_and_tiny_ones_are_numbers(device, implementation):
    weight = torch.ones(2, 300, device=device)
    grad = torch.zeros_like(weight)
    grad[1] = 1e-25
    averages = [quantize(torch.zeros_like(weight), signed=signed) for signed in (True, False)]
    for step in (1, 2, 3):
        adamw_8bit_(weight, grad, *averages, NUMBERS._replace(step=step), implementation=implementation)
    assert weight.isfinite().all()
    assert not any(dequantize(one)[0].any() for one in averages)


def test_whoever_holds_some_of_the_rows_computes_what_one_that_holds_all_does(draw):
    tensors = _tensors(draw, (7, 1030))
    whole = _stepped(tensors)
    for rows in (slice(0, 4), slice(4, 7)):
        weight, grad, average, square = tensors
        part = (weight[rows], grad[rows], *(Average(*(one[rows] for one in pair)) for pair in (average, square)))
        found = _stepped(part)
        assert torch.equal(found[0], whole[0][rows])
        for ours, theirs in zip(found[1:], whole[1:], strict=True):
            assert torch.equal(ours.code, theirs.code[rows])
            assert torch.equal(ours.scale, theirs.scale[rows])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_twenty_steps_are_near_those_of_torchs_adamw(draw, implementation):
    weight, grad = draw(8, 512).float(), draw(8, 512).float()
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    averages = [quantize(torch.zeros_like(weight), signed=signed) for signed in (True, False)]
    for step in range(1, 21):
        now = grad + draw(8, 512).float()
        parameter.grad = now.clone()
        theirs.step()
        adamw_8bit_(weight, now, *averages, NUMBERS._replace(step=step), implementation=implementation)
    # Twenty steps of 0.01; rounding the averages changes each by some percent, up and down.
    assert (weight - parameter).abs().max() < 0.02
    assert (weight - parameter).square().mean().sqrt() < 2e-3


def test_a_wide_row_goes_through_the_reference_in_pieces(draw, monkeypatch):
    from stoker.kernels import adamw_8bit

    tensors = _tensors(draw, (2, 3000))
    whole = _stepped(tensors)
    monkeypatch.setattr(adamw_8bit, "_PIECE", 4 * BLOCK_SIZE)
    for ours, theirs in zip(_stepped(tensors), whole, strict=True):
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, Average) else [(ours, theirs)]
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_it_cannot_step_through_is_refused():
    weight = torch.zeros(4, 4)
    average, square = (quantize(weight, signed=signed) for signed in (True, False))
    with pytest.raises(ValueError, match="contiguous"):
        adamw_8bit_(weight.t()[:, 1:], weight, average, square, NUMBERS)
    with pytest.raises(ValueError, match="256 share one"):
        adamw_8bit_(weight, weight, average._replace(scale=torch.zeros(4, 2)), square, NUMBERS)
    assert scale_shape(torch.Size((3, 5, 257))) == (3, 5, 2)
