"""SwiGLU's kernel on gate and up side by side."""

import pytest
import torch

from stoker.kernels.glu import gated, gated_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 64), (3, 66), (1, 2), (2, 3, 10), (2, 4100), (0, 8)]


@pytest.mark.parametrize(
    ("activation", "overwrite"), [("silu", False), ("silu", True), ("gelu", False), ("gelu_tanh", True)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_as_exact_as_eager(shape, dtype, activation, overwrite, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        # A copy stands for the matmul whose output the backward may overwrite.
        lambda gate_up: gated(gate_up.clone(), activation=activation, implementation="triton", overwrite=overwrite),
        lambda gate_up: gated_reference(gate_up, activation),
        [draw(*shape, scale=3.0)],
        dtype=dtype,
        factor=2.0 if activation == "silu" else 4.0,  # GELU's kernel has fewer operations than eager, in other forms
    )


def test_large_values_neither_overflow_nor_give_nan(draw):
    gate_up = torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=draw(1).device).requires_grad_()
    out = gated(gate_up, implementation="triton")
    torch.testing.assert_close(out, gated_reference(gate_up))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), gate_up)[0].isfinite().all().item(), True)


def test_overwriting_reuses_the_memory_of_gate_up_and_refuses_a_second_backward(draw):
    gate_up = draw(3, 16).float().requires_grad_()
    copy = gate_up.clone()
    out = gated(copy, implementation="triton", overwrite=True)
    before = copy.detach().clone()
    out.sum().backward(retain_graph=True)
    assert torch.equal(copy.detach(), gate_up.grad)
    assert not torch.equal(copy.detach(), before)
    with pytest.raises(RuntimeError, match="overwritten by an earlier backward"):
        out.sum().backward()


def test_without_overwriting_gate_up_stays_and_two_backwards_agree(draw):
    gate_up = draw(3, 16).float().requires_grad_()
    before = gate_up.detach().clone()
    out = gated(gate_up, implementation="triton")
    first, second = (torch.autograd.grad(out.sum(), gate_up, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(gate_up.detach(), before)


def test_columns_of_a_wider_tensor_are_read_by_their_stride(draw):
    wide = draw(4, 40).float()
    gate_up = wide[:, 8:24].detach().requires_grad_()
    out = gated(gate_up, implementation="triton", overwrite=True)
    torch.testing.assert_close(out, gated_reference(gate_up), rtol=1e-6, atol=1e-6)
    grad = draw(4, 16).float()[:, 3:11]
    expected = torch.autograd.grad(gated_reference(gate_up), gate_up, grad)
    torch.testing.assert_close(torch.autograd.grad(out, gate_up, grad), expected, rtol=1e-5, atol=1e-6)
