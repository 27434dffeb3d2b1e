import pytest
import torch
from torch import nn

from stoker.optim.adafactor import Adafactor

SHAPES = [(7, 5), (3, 4, 6), (9,), (1, 8)]


def test_it_is_transformers_adafactor_without_its_scaling():
    theirs_class = pytest.importorskip("transformers.optimization").Adafactor
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(one.detach().clone()) for one in ours]
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    reference = theirs_class(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    groups = [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:], "weight_decay": 0.0}]
    optimizer = Adafactor(groups, lr=1e-2)
    for step in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one) * 10.0 ** (step - 3)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        state, expected = optimizer.state[one], reference.state[other]
        assert {name: value.shape for name, value in state.items() if name != "step"} == {
            name: value.shape for name, value in expected.items() if name not in ("step", "RMS")
        }
        for name, value in state.items():
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected[name]), rtol=1e-5, atol=0)


def test_a_parameter_without_a_gradient_is_left_alone():
    parameters = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = Adafactor([{"params": parameters}], lr=1e-2)
    parameters[0].grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(parameters[1].detach(), torch.ones(3, 3))
    assert not torch.equal(parameters[0].detach(), torch.ones(3, 3))
