"""The head and the loss in one: reference and kernel against the formula with all logits at once."""

import pytest
import torch

from stoker.kernels.linear_cross_entropy import (
    LossOptions,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_log_probabilities,
)
from stoker.kernels.turn_logits import SCALE_BLOCK, scaled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = ["reference", "triton"]
OPTIONS = [
    LossOptions(),
    LossOptions(logit_scale=0.25),
    LossOptions(soft_cap=2.0),
    LossOptions(label_smoothing=0.1),
    LossOptions(z_loss=1e-2),
    LossOptions(logit_scale=1.5, soft_cap=3.0, label_smoothing=0.2, z_loss=1e-2),
]


def some_targets(num_rows, vocabulary, device, *, every=3):
    targets = torch.arange(num_rows, device=device) * 7 % vocabulary
    targets[::every] = -100
    return targets


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 16, 64), (5, 6, 33), (2, 3, 1), (7, 8, 130)])
def test_loss_and_gradients_are_as_exact_as_eager(shape, dtype, implementation, draw, device, assert_as_exact_as_eager):
    num_rows, width, vocabulary = shape
    targets = some_targets(num_rows, vocabulary, device)
    assert_as_exact_as_eager(
        lambda hidden, weight, bias: linear_cross_entropy(
            hidden, weight, targets, bias=bias, chunk_tokens=3, implementation=implementation
        ),
        lambda hidden, weight, bias: linear_cross_entropy_reference(hidden, weight, targets, bias=bias),
        [draw(num_rows, width), draw(vocabulary, width, scale=0.3), draw(vocabulary)],
        dtype=dtype,
        # Eager rounds the sum of the gradients of all rows once; chunks of p are rounded row by row.
        factor=3.0,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_variation_of_the_loss_has_its_gradients(options, implementation, draw, device):
    targets = some_targets(6, 37, device)
    hidden, weight = draw(6, 8).float().requires_grad_(), draw(37, 8).float().requires_grad_()
    expected = linear_cross_entropy_reference(hidden, weight, targets, options=options)
    actual = linear_cross_entropy(
        hidden, weight, targets, options=options, chunk_tokens=4, implementation=implementation
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 37 terms in another order
    for result, truth in zip(
        torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_incoming_gradient_scales_all_gradients(implementation, draw, device):
    targets = some_targets(4, 9, device)
    hidden, weight = draw(4, 8).float().requires_grad_(), draw(9, 8).float().requires_grad_()
    grads = [
        torch.autograd.grad(
            linear_cross_entropy(hidden, weight, targets, implementation=implementation) * factor, (hidden, weight)
        )
        for factor in (1.0, 0.125)
    ]
    for whole, smaller in zip(*grads, strict=True):
        assert torch.equal(whole * 0.125, smaller)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [LossOptions(), OPTIONS[-1]])
def test_running_untrained_rows_along_changes_nothing(options, implementation, draw, device):
    targets = some_targets(7, 20, device)
    num_trained = int((targets != -100).sum())
    assert 0 < num_trained < 6
    inputs = [draw(*shape).float().requires_grad_() for shape in ((7, 8), (20, 8), (20,))]
    results = []
    for num_rows in (None, 7, num_trained, 6):
        loss = linear_cross_entropy(
            *inputs[:2],
            targets,
            bias=inputs[2],
            chunk_tokens=3,
            options=options,
            num_rows=num_rows,
            implementation=implementation,
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for selected, *others in zip(*results, strict=True):
        for one in others:
            torch.testing.assert_close(one, selected, rtol=1e-5, atol=1e-6)  # the same float32 terms in another order


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_trained_row_gives_zero_and_zero_gradients(implementation, draw, device):
    hidden, weight = draw(3, 8).float().requires_grad_(), draw(9, 8).float().requires_grad_()
    targets = torch.full((3,), -100, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_large_logits_neither_overflow_nor_lose_the_loss(draw, device):
    hidden = torch.full((2, 4), 100.0, device=device).requires_grad_()
    weight = draw(5000, 4, scale=10.0).float()  # more columns than a block: the running maximum is rescaled
    targets = torch.tensor([0, 4999], device=device)
    expected = linear_cross_entropy_reference(hidden, weight, targets)
    actual = linear_cross_entropy(hidden, weight, targets, implementation="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert torch.autograd.grad(actual, hidden)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, SCALE_BLOCK, 2 * SCALE_BLOCK + 5])
def test_a_trained_heads_gradient_is_scaled_and_rounded_as_pytorch_does(count, dtype, draw, device):
    values, factor = draw(count).float().to(device), torch.tensor(1 / 3, device=device)
    expected = (values * factor).to(dtype)
    assert torch.equal(scaled(values.clone(), factor, dtype, uses_triton=False), expected)
    if dtype == torch.bfloat16 and not values.is_cuda:  # the interpreter cuts where a GPU rounds
        expected = ((values * factor).view(torch.int32) & -65536).view(torch.float32).to(dtype)
    assert torch.equal(scaled(values.clone(), factor, dtype, uses_triton=True), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_that_were_scaled_in_place_are_not_scaled_again(implementation, draw, device):
    hidden, weight = draw(6, 8).float().requires_grad_(), draw(37, 8).float().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, some_targets(6, 37, device), implementation=implementation)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_rows", [None, 4, 6])
@pytest.mark.parametrize("chunk_tokens", [2, 6])
def test_rows_that_are_overwritten_are_the_heads_own(chunk_tokens, num_rows, implementation, draw, device):
    targets = some_targets(6, 37, device)
    hidden, weight = draw(6, 8).float().requires_grad_(), draw(37, 8).float().requires_grad_()
    before = hidden.detach().clone()
    options = {"chunk_tokens": chunk_tokens, "num_rows": num_rows, "implementation": implementation}
    loss = linear_cross_entropy(hidden, weight, targets, **options)
    assert torch.equal(hidden.detach(), before)
    expected = linear_cross_entropy_reference(hidden, weight, targets)
    pairs = zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (loss, expected)), strict=True)
    for actual, truth in pairs:
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient(draw, device):
    targets = some_targets(4, 9, device)
    hidden, weight = draw(4, 8).float().requires_grad_(), draw(9, 8).float()
    linear_cross_entropy(hidden, weight, targets, implementation="triton").backward()
    assert weight.grad is None
    expected = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, targets), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)
    assert not hidden.grad[0].any()  # an untrained row


def test_two_runs_agree_bit_for_bit(draw, device):
    targets = some_targets(9, 50, device)
    hidden, weight = draw(9, 8).float().requires_grad_(), draw(50, 8).float().requires_grad_()
    runs = [
        torch.autograd.grad(
            linear_cross_entropy(hidden, weight, targets, chunk_tokens=2, implementation="triton"), (hidden, weight)
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_is_trained", [True, False])
def test_log_probabilities_of_tokens_and_their_gradients(head_is_trained, implementation, draw, device):
    targets = some_targets(7, 20, device)
    options = LossOptions(logit_scale=0.7, soft_cap=4.0)
    hidden = draw(7, 8).float().requires_grad_()
    weight, bias = (draw(*shape).float().requires_grad_(head_is_trained) for shape in ((20, 8), (20,)))
    inputs = (hidden, weight, bias) if head_is_trained else (hidden,)
    logits = options.soft_cap * torch.tanh((hidden @ weight.T + bias) * options.logit_scale / options.soft_cap)
    expected = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * (targets >= 0)
    actual = token_log_probabilities(
        hidden, weight, targets, bias=bias, options=options, chunk_tokens=2, implementation=implementation
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    grad = draw(7).float()
    for result, truth in zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


def test_log_probabilities_refuse_what_belongs_to_the_loss(draw, device):
    with pytest.raises(ValueError, match="label_smoothing and z_loss"):
        token_log_probabilities(
            draw(2, 4), draw(3, 4), some_targets(2, 3, device), options=LossOptions(label_smoothing=0.1)
        )
