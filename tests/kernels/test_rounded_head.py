"""A frozen head in fp8: its loss and gradient against the formula with the same rounded values, and against bf16's."""

import pytest
import torch

from stoker.kernels import fp8
from stoker.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy, linear_cross_entropy_reference
from stoker.kernels.rounded_head import round_head
from stoker.kernels.turn_logits import turn_rounded_reference, turn_rounded_triton

IMPLEMENTATIONS = ["reference", "triton"]
OPTIONS = [
    LossOptions(),
    LossOptions(logit_scale=0.25),
    LossOptions(soft_cap=2.0),
    LossOptions(label_smoothing=0.1),
    LossOptions(z_loss=1e-2),
    LossOptions(logit_scale=1.5, soft_cap=3.0, label_smoothing=0.2, z_loss=1e-2),
]


def some_targets(num_rows, vocabulary, device):
    targets = torch.arange(num_rows, device=device) * 7 % vocabulary
    targets[::3] = -100
    return targets


def as_rounded(hidden, head, implementation):
    """The values that products in fp8 read, in float64: rows with scales of their own, and the weight."""
    rows = fp8.quantize_rows(hidden.detach(), implementation=implementation)
    return rows.values.double() * rows.scale.double(), head.values.double() * head.scale.double()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(9, 32, 96), (5, 16, 144), (2, 16, 16)])
def test_loss_and_gradient_are_those_of_the_rounded_values(shape, options, implementation, draw, device):
    num_rows, width, vocabulary = shape
    hidden = draw(num_rows, width).bfloat16().requires_grad_()
    weight = draw(vocabulary, width, scale=0.3).bfloat16()
    targets, head = some_targets(num_rows, vocabulary, device), round_head(weight)
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        chunk_tokens=4,
        options=options,
        rounded=head,
        implementation=implementation,
    )
    rows, exact = as_rounded(hidden, head, implementation)
    rows.requires_grad_()
    expected = linear_cross_entropy_reference(rows, exact, targets, options=options)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=2**-8 * num_rows)  # bf16's logits
    (gradient,) = torch.autograd.grad(loss * 0.5, hidden)
    (truth,) = torch.autograd.grad(expected * 0.5, rows)
    assert not gradient[targets == -100].any()
    # A value of dz moves by at most 2^-4 of itself; over a row their sum moves far less. Triton's interpreter rounds to
    # fp8 wrongly where the mantissa carries, by up to a half.
    is_exact = implementation == "reference" or hidden.is_cuda
    assert (gradient.double() - truth).norm() < (2**-4 if is_exact else 0.2) * truth.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_the_head_in_bf16_but_for_rounding(implementation, draw, device):
    hidden, weight = draw(32, 256).bfloat16().requires_grad_(), draw(512, 256, scale=0.05).bfloat16()
    targets = some_targets(32, 512, device)
    results = []
    for rounded in (None, round_head(weight)):
        loss = linear_cross_entropy(hidden, weight, targets, rounded=rounded, implementation=implementation)
        results.append((loss.item(), torch.autograd.grad(loss, hidden)[0].double()))
    (plain, plain_gradient), (loss, gradient) = results
    assert loss == pytest.approx(plain, rel=2e-3)
    assert loss != plain
    assert (gradient - plain_gradient).norm() < 0.05 * plain_gradient.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_value_of_the_target_is_exact_and_small_gradients_keep_their_bits(implementation, device):
    # Row 0 is sure of its target, row 1 of another token, row 2 of nothing.
    logits = torch.zeros(3, 64, device=device, dtype=torch.bfloat16)
    logits[0, 5], logits[1, 7] = 12.0, 12.0
    targets = torch.tensor([5, 3, 9], device=device)
    out, scale = fp8.empty_rounded(3, 64, torch.device(device)), torch.ones(3, 1, device=device)
    turn = turn_rounded_triton if implementation == "triton" else turn_rounded_reference
    turn(logits, scale, None, targets, None, options=LossOptions(), out=out)
    exact = torch.softmax(logits.double(), 1)
    exact[torch.arange(3), targets] -= 1
    made = out.values.double() * out.scale.double()
    target = (torch.arange(3), targets)
    torch.testing.assert_close(made[target], exact[target], rtol=1e-3, atol=0)
    # e4m3's own rounding, or half its smallest step where values lie below a seventy-thousandth of the row's largest.
    assert ((made - exact).abs() <= 2**-4 * exact.abs() + out.scale.double() * 2**-10).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_fixed_number_of_rows_trains_as_all_that_are_trained(implementation, draw, device):
    hidden, weight = draw(8, 32).bfloat16().requires_grad_(), draw(48, 32).bfloat16()
    targets, head = some_targets(8, 48, device), round_head(weight)
    found = []
    for num_rows in (None, 6, 8):
        loss = linear_cross_entropy(
            hidden, weight, targets, chunk_tokens=4, num_rows=num_rows, rounded=head, implementation=implementation
        )
        found.append((loss, torch.autograd.grad(loss, hidden)[0]))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-2, atol=1e-5)


def test_rounding_keeps_the_weight_to_three_bits(draw):
    weight = draw(80, 32, scale=0.02).bfloat16()
    head = round_head(weight)
    torch.testing.assert_close(
        head.values.float() * head.scale, weight.float(), rtol=2**-4, atol=head.scale.item() / 512
    )
    assert torch.equal(head.transposed.float(), head.values.float().T)
    assert head.transposed.is_contiguous()
    assert not round_head(torch.zeros(16, 16)).values.float().any()


def test_a_trained_head_is_not_rounded(draw, device):
    hidden, weight = draw(4, 16).bfloat16(), draw(16, 16).bfloat16().requires_grad_()
    with pytest.raises(ValueError, match="a head in fp8 is frozen"):
        linear_cross_entropy(hidden, weight, some_targets(4, 16, device), rounded=round_head(weight))
