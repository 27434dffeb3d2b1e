import pytest
import torch

from stoker.kernels.glu import ACTIVATIONS, gated, gated_backward, gated_reference


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 5, 14), (1, 2), (0, 6)])
def test_output_and_gradient_equal_the_formula(shape, activation):
    generator = torch.Generator().manual_seed(0)
    gate_up = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    out, expected = gated(gate_up, activation=activation), gated_reference(gate_up, activation)
    assert torch.equal(out, expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, gate_up, grad) for y in (out, expected))
    # The same functions of PyTorch in the same order, up to one rounding of values of order 10.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_written_out_backward_is_autograds(activation):
    gate_up = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grad = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = gated_reference(gate_up, activation)
    expected = torch.autograd.grad(out, gate_up, grad)[0]
    ours, activated = gated_backward(gate_up.detach().clone(), grad.clone(), activation=activation)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(activated, out)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation = 'swish'"):
        gated(torch.ones(1, 2), activation="swish")


def test_gate_comes_first():
    assert gated(torch.tensor([[0.0, 5.0]])).item() == 0.0
    assert gated(torch.tensor([[5.0, 0.0]])).item() == 0.0
    assert gated(torch.tensor([[-100.0, 5.0]])).item() == 0.0
    assert gated(torch.tensor([[100.0, -5.0]])).item() == -500.0


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="abacus"):
        gated(torch.ones(1, 2), implementation="abacus")
