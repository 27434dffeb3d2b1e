import pytest
import torch

from stoker.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference

EPSILON = 1e-5
# fp32, 33 terms a row and 10 rows a weight gradient, in another order than the formula's.
TOLERANCE = 3e-6


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 5, 33), (1, 33), (10, 33)])
@pytest.mark.parametrize("frozen", [False, True])
def test_output_and_gradients_equal_the_formula(shape, frozen):
    x, weight = draw(*shape), draw(33, seed=1).detach().requires_grad_(not frozen)
    wanted = [x] if frozen else [x, weight]
    grad = draw(*shape, seed=2).detach()
    out, expected = rms_norm(x, weight, EPSILON), rms_norm_reference(x, weight, EPSILON)
    assert (out - expected).abs().max() <= TOLERANCE
    found = torch.autograd.grad(out, wanted, grad)
    for ours, theirs in zip(found, torch.autograd.grad(expected, wanted, grad), strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


def test_a_transposed_input_has_the_same_gradient():
    x, weight = draw(4, 3, 8).detach(), draw(8, seed=1)
    transposed = x.transpose(0, 1).requires_grad_()
    rms_norm(transposed, weight, EPSILON).transpose(0, 1).square().sum().backward()
    plain = x.clone().requires_grad_()
    rms_norm_reference(plain, weight.detach(), EPSILON).square().sum().backward()
    assert (transposed.grad.transpose(0, 1) - plain.grad).abs().max() <= TOLERANCE


def test_sum_and_its_norm_carry_both_gradients():
    x, residual, weight = draw(4, 33), draw(4, 33, seed=1), draw(33, seed=2)
    normed, total = add_rms_norm(x, residual, weight, EPSILON)
    expected = rms_norm_reference(residual + x, weight, EPSILON)
    assert torch.equal(total, residual + x)
    grads = torch.autograd.grad((normed * 2 + total).sum(), [x, residual])
    wanted = torch.autograd.grad((expected * 2 + (residual + x)).sum(), [x, residual])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


def test_half_precision_keeps_fp32_statistics():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # the square of 300 is past fp16's 65504
    assert torch.equal(rms_norm(x, torch.ones(4096), EPSILON), torch.ones(1, 4096, dtype=torch.float16))


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="abacus"):
        rms_norm(draw(2, 4), torch.ones(4), EPSILON, implementation="abacus")
