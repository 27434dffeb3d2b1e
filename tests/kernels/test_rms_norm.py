"""RMSNorm's kernel, alone and fused with the residual add."""

import pytest
import torch

from stoker.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Powers of two, odd, one row, more rows than programs, wide, three dimensions.
SHAPES = [(2, 64), (3, 33), (1, 1), (7, 128), (1, 5000), (2, 3, 16)]
EPSILON = 1e-5


def wide_reference(x, weight):
    # rms_norm_reference widens to float32; the truth needs float64 throughout.
    if x.dtype is not torch.float64:
        return rms_norm_reference(x, weight, EPSILON)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_is_as_exact_as_eager(shape, dtype, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        lambda x, weight: rms_norm(x, weight, EPSILON, implementation="triton"),
        wide_reference,
        [draw(*shape), draw(shape[-1])],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_of_a_sum_is_as_exact_as_eager(shape, dtype, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        lambda x, residual, weight: add_rms_norm(x, residual, weight, EPSILON, implementation="triton"),
        lambda x, residual, weight: (wide_reference(residual + x, weight), residual + x),
        [draw(*shape), draw(*shape), draw(shape[-1])],
        dtype=dtype,
    )


def test_rows_of_a_view_are_read_by_their_stride(draw):
    x = draw(5, 64).float()[:, 16:48].detach().requires_grad_()
    weight = draw(32).float()
    expected = rms_norm_reference(x, weight, EPSILON)
    actual = rms_norm(x, weight, EPSILON, implementation="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # float32 sums of 32 values
    grad = draw(5, 64).float()[:, ::2]
    torch.testing.assert_close(
        torch.autograd.grad(actual, x, grad), torch.autograd.grad(expected, x, grad), rtol=1e-5, atol=1e-5
    )


def test_only_the_sum_used_gives_its_gradient_alone(draw):
    x, residual, weight = (draw(2, 8).float().requires_grad_() for _ in range(3))
    _, total = add_rms_norm(x, residual, weight[0], EPSILON, implementation="triton")
    grad = draw(2, 8).float()
    for result in torch.autograd.grad(total, (x, residual), grad):
        assert torch.equal(result, grad)


def test_a_frozen_weight_gets_no_gradient_and_changes_nothing_else(draw):
    x, weight, grad = draw(5, 32).float().requires_grad_(), draw(32).float(), draw(5, 32).float()
    frozen = torch.autograd.grad(rms_norm(x, weight, EPSILON, implementation="triton"), x, grad)
    trained = torch.autograd.grad(rms_norm(x, weight.requires_grad_(), EPSILON, implementation="triton"), x, grad)
    assert torch.equal(frozen[0], trained[0])


def test_the_weight_s_gradient_is_the_same_in_every_run(draw):
    x, weight, grad = draw(300, 40).float(), draw(40).float().requires_grad_(), draw(300, 40).float()
    runs = [torch.autograd.grad(rms_norm(x, weight, EPSILON, implementation="triton"), weight, grad) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])


def test_mixed_dtypes_give_each_input_its_own_gradient_dtype(draw):
    x, residual = draw(3, 16).bfloat16().requires_grad_(), draw(3, 16).float().requires_grad_()
    weight = draw(16).float().requires_grad_()
    normed, total = add_rms_norm(x, residual, weight, EPSILON, implementation="triton")
    assert (normed.dtype, total.dtype) == (torch.float32, torch.float32)
    grads = torch.autograd.grad((normed, total), (x, residual, weight), (normed.detach(), total.detach()))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_no_rows_give_no_rows_and_a_zero_weight_gradient(draw):
    x, weight = draw(0, 16).float().requires_grad_(), draw(16).float().requires_grad_()
    out = rms_norm(x, weight, EPSILON, implementation="triton")
    assert out.shape == (0, 16)
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], torch.zeros_like(weight))


def test_unknown_implementation_is_refused(draw):
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        rms_norm(draw(1, 4), draw(4), EPSILON, implementation="cuda")
