"""LayerNorm, alone and after a residual sum: outputs and every gradient against truth and eager."""

import pytest
import torch

from stoker.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference
from stoker.nn.norm import LayerNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-3


def run(implementation, *, bias, residual):
    def op(x, other, weight, shift):
        shift = shift if bias else None
        if residual:
            return add_layer_norm(x, other, weight, shift, EPSILON, implementation=implementation)
        return layer_norm(x + other, weight, shift, EPSILON, implementation=implementation)

    return op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 33), (1, 130)])
def test_with_residual_and_bias_it_is_as_exact_as_eager(shape, dtype, draw, assert_as_exact_as_eager):
    # A mean far from 0: what subtracts it from squares would lose it.
    inputs = [draw(*shape) + 5.0, draw(*shape), draw(shape[-1]), draw(shape[-1])]
    kernel, reference = (run(kind, bias=True, residual=True) for kind in ("triton", "reference"))
    assert_as_exact_as_eager(kernel, reference, inputs, dtype=dtype)


def test_alone_it_is_as_exact_as_eager(draw, assert_as_exact_as_eager):
    inputs = [draw(4, 12), draw(4, 12), draw(12), draw(12)]
    kernel, reference = (run(kind, bias=True, residual=False) for kind in ("triton", "reference"))
    assert_as_exact_as_eager(kernel, reference, inputs, dtype=torch.float32)


def test_without_bias_and_with_frozen_weight_only_x_has_a_gradient(draw):
    x, weight = draw(3, 6).float().requires_grad_(), draw(6).float()
    expected = torch.autograd.grad(layer_norm_reference(x, weight, None, EPSILON).square().sum(), x)
    actual = torch.autograd.grad(layer_norm(x, weight, None, EPSILON, implementation="triton").square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_where_only_the_sum_is_used_its_gradient_goes_through(draw):
    x, residual = draw(3, 6).float().requires_grad_(), draw(3, 6).float().requires_grad_()
    _, total = add_layer_norm(x, residual, draw(6).float(), None, EPSILON, implementation="triton")
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 6, device=x.device))
    assert torch.equal(residual.grad, x.grad)


def test_rows_of_a_view_and_no_rows_at_all(draw):
    weight, bias = draw(6).float(), draw(6).float()
    x = draw(4, 12).float()[:, 3:9]
    actual = layer_norm(x, weight, bias, EPSILON, implementation="triton")
    torch.testing.assert_close(actual, layer_norm_reference(x, weight, bias, EPSILON))
    assert layer_norm(x[:0], weight, bias, EPSILON, implementation="triton").shape == (0, 6)


def test_two_runs_agree_bit_for_bit(draw):
    def gradients():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(layer_norm(*leaves, EPSILON, implementation="triton").square().sum(), leaves)

    x, weight, bias = draw(50, 9).float(), draw(9).float(), draw(9).float()
    assert all(map(torch.equal, gradients(), gradients()))


@pytest.mark.parametrize("how", [{}, {"bias": False}, {"offset": 1.0}, {"weight": False, "bias": False}])
def test_the_module_computes_the_same_by_either_implementation(how, draw, device):
    x, residual = draw(3, 8).float(), draw(3, 8).float()
    plain, fused = (LayerNorm(8, epsilon=EPSILON, kernels=kind, **how).to(device) for kind in ("reference", "triton"))
    for one, other in zip(plain.add(x, residual), fused.add(x, residual), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(plain(x), fused(x))
