import pytest
import torch

from stoker.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def draw(rows=13, dim=8, vocabulary=17, trained=0.6):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, dim, generator=generator).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) > trained] = -100
    return hidden, weight, bias, targets


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_and_gradients_equal_the_formula(chunk_tokens, has_bias):
    hidden, weight, bias, targets = draw()
    inputs = [hidden, weight, bias] if has_bias else [hidden, weight]
    options = {"bias": bias} if has_bias else {}
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens, **options)
    expected = linear_cross_entropy_reference(hidden, weight, targets, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = torch.autograd.grad(loss / 3, inputs)
    for ours, theirs in zip(found, torch.autograd.grad(expected / 3, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_untrained_rows_reach_no_matmul(monkeypatch):
    hidden, weight, _, targets = draw(rows=50, trained=0.3)
    rows = []
    original = torch.mm

    def spy(a, b, **options):
        rows.append(a.shape[0])
        return original(a, b, **options)

    monkeypatch.setattr(torch, "mm", spy)
    linear_cross_entropy(hidden, weight, targets)
    assert set(rows) == {int((targets != -100).sum())}
    assert 0 < rows[0] < 50


def test_logits_held_at_once_stay_within_the_chunk(monkeypatch):
    hidden, weight, _, targets = draw(rows=50, trained=1.0)
    sizes = []
    original = torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda x: sizes.append(tuple(x.shape)) or original(x))
    linear_cross_entropy(hidden, weight, targets, chunk_tokens=8)
    assert max(sizes) == (8, 17)
    assert len(sizes) == 7


def test_a_frozen_weight_gets_no_gradient_and_costs_none():
    hidden, weight, _, targets = draw()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None
    assert hidden.grad[targets != -100].abs().sum() > 0
    assert hidden.grad[targets == -100].abs().sum() == 0


def test_no_trained_row_gives_zero_and_zero_gradients():
    hidden, weight, _, targets = draw()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_large_logits_stay_finite():
    hidden, weight, _, targets = draw()
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert loss.isfinite()
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden * 1e4, weight, targets))


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, _, targets = draw()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, targets).detach())


def test_autocast_runs_the_matmul_in_its_dtype():
    hidden, weight, _, targets = draw(trained=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    exact = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)  # bf16 resolves 1/256
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
