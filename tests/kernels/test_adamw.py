"""AdamW's step on bf16 and fp32 tensors, and the random bits that round it."""

import pytest
import torch

from stoker.kernels.adamw import LANES, AdamWStep, adamw_, random_bits, round_stochastically

NUMBERS = AdamWStep(3, learning_rate=1e-2, first_beta=0.9, second_beta=0.99, epsilon=1e-8, weight_decay=0.1)
SEED = 2**61 + 12345


def _tensors(draw, size, dtype):
    weight, grad, average, square = (draw(size).to(dtype) for _ in range(4))
    return weight, grad, average, square.abs()


def _stepped(tensors, numbers=NUMBERS, **options):
    weight, grad, average, square = (one.clone() for one in tensors)
    adamw_(weight, grad, average, square, numbers, **({"seed": SEED, "number": 7} | options))
    return weight, average, square


@pytest.mark.parametrize("size", [1, 1000, 4 * LANES, 4 * LANES + 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_the_references_bits_and_rounds_as_it_does(draw, device, size, dtype):
    tensors = _tensors(draw, size, dtype)
    ours = _stepped(tensors, NUMBERS._replace(gradient_scale=0.3), implementation="triton")
    theirs = _stepped(tensors, NUMBERS._replace(gradient_scale=0.3))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
        else:
            # A GPU fuses products and sums: a last fp32 bit that differs turns one rounding in 65,536 at most.
            assert (one != other).sum() <= 1 + size * 2e-3 * (device.type == "cuda")
            torch.testing.assert_close(one, other, rtol=2**-7, atol=0.0)


def test_in_fp32_it_is_torchs_adamw(draw):
    weight, grad = draw(50).float(), draw(50).float()
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    average, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        parameter.grad = grad * step
        theirs.step()
        adamw_(weight, grad * step, average, square, NUMBERS._replace(step=step), seed=0, number=0)
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_expectation_is_the_unrounded_step(device, implementation):
    """Values a fifth of the way between two bf16 numbers go up in a fifth of cases, down in the others."""
    size, ulp = 2**16, 2.0**-7
    numbers = AdamWStep(1, learning_rate=ulp / 5, first_beta=0.0, second_beta=0.0, epsilon=0.0, weight_decay=0.0)
    weight = torch.ones(size, dtype=torch.bfloat16, device=device)
    grad = torch.full_like(weight, -2.0)
    tensors = weight, grad, torch.zeros_like(weight), torch.zeros_like(weight)
    stepped, _, _ = _stepped(tensors, numbers, implementation=implementation)
    assert set(stepped.unique().tolist()) == {1.0, 1.0 + ulp}
    share = (stepped > 1.0).float().mean().item()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / size) ** 0.5


def test_a_square_average_decays_where_the_nearest_rounding_would_not_move_it():
    numbers = AdamWStep(1, learning_rate=0.0, first_beta=0.9, second_beta=0.999, epsilon=1e-8, weight_decay=0.0)
    tensors = [torch.zeros(4096, dtype=torch.bfloat16) for _ in range(3)]
    square = torch.ones(4096, dtype=torch.bfloat16)
    assert torch.equal((square.float() * 0.999).bfloat16(), square)
    for step in range(1, 101):
        adamw_(*tensors, square, numbers._replace(step=step), seed=1, number=0)
    assert square.float().mean().item() == pytest.approx(0.999**100, rel=5e-3)


def test_bits_are_uniform_and_those_of_a_value_independent():
    lots = torch.stack(random_bits(4 * LANES * 32, seed=SEED, step=5, number=2)).double() / 65536 - 0.5
    count = lots.shape[1]
    assert lots.min() >= -0.5
    assert lots.max() < 0.5
    assert lots.mean(1).abs().max() < 5 * (1 / 12 / count) ** 0.5
    correlation = torch.corrcoef(torch.cat([lots, lots[:1].roll(1), lots[:1].roll(LANES)]))
    assert (correlation - torch.eye(5)).abs().max() < 5 / count**0.5


def test_seed_step_number_and_place_each_change_the_bits():
    def bits(**changes):
        return random_bits(256, **({"seed": 1, "step": 1, "number": 1} | changes))[0]

    plain = bits()
    assert torch.equal(plain, bits())
    for changes in ({"seed": 2}, {"seed": 1 + 2**40}, {"step": 2}, {"number": 2}, {"start": 4 * LANES}):
        assert (plain == bits(**changes)).float().mean() < 0.05


def test_philox_gives_the_published_words():
    """The known answer of counter and key all ones, from the authors' test vectors (Random123, philox4x32-10)."""
    from stoker.kernels.adamw import _philox

    ones = 0xFFFFFFFF
    words = _philox(torch.tensor([0]), 0, 0, 0)
    assert [hex(int(word)) for word in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert all(0 <= int(word) <= ones for word in _philox(torch.tensor([ones]), ones, ones, 2**63 - 1))


def test_rounding_keeps_what_bf16_can_hold_and_infinities():
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf"), 2.0**-126])
    rounded = round_stochastically(values, torch.full(values.shape, 65535, dtype=torch.int32))
    assert torch.equal(rounded.float(), values)


def test_strides_that_it_cannot_step_through_are_refused():
    square = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="contiguous"):
        adamw_(square.t()[:, 1:], square, square, square, NUMBERS, seed=0, number=0)
