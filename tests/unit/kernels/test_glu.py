import pytest
import torch

from stoker.kernels.glu import swiglu, swiglu_reference


@pytest.mark.parametrize("shape", [(2, 5, 14), (1, 2), (0, 6)])
def test_output_and_gradient_equal_the_formula(shape):
    generator = torch.Generator().manual_seed(0)
    gate_up = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    out, expected = swiglu(gate_up), swiglu_reference(gate_up)
    assert torch.equal(out, expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, gate_up, grad) for y in (out, expected))
    # The same functions of PyTorch in the same order, up to one rounding of values of order 10.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gate_comes_first():
    assert swiglu(torch.tensor([[0.0, 5.0]])).item() == 0.0
    assert swiglu(torch.tensor([[5.0, 0.0]])).item() == 0.0
    assert swiglu(torch.tensor([[-100.0, 5.0]])).item() == 0.0
    assert swiglu(torch.tensor([[100.0, -5.0]])).item() == -500.0


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="abacus"):
        swiglu(torch.ones(1, 2), implementation="abacus")
