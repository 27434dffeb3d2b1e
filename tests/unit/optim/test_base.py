"""What our own optimisers share: the closure and the scale of gradients."""

import torch

from stoker.optim.base import OwnAdamW


class Plain(OwnAdamW):
    """Takes the scaled gradient off each weight."""

    def step_all(self):
        for group in self.param_groups:
            numbers = self.numbers(group, 1)
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=numbers["learning_rate"] * numbers["gradient_scale"])


def plain(*parameters):
    return Plain([{"params": list(parameters)}], lr=0.5, betas=(0.9, 0.99), eps=1e-8)


def test_the_closure_runs_first_with_gradients_and_its_loss_is_returned():
    weight = torch.nn.Parameter(torch.tensor([2.0]))

    def closure():
        loss = (weight * weight).sum()
        loss.backward()
        return float(loss)

    assert plain(weight).step(closure) == 4.0
    assert weight.item() == 2.0 - 0.5 * 4.0


def test_gradients_are_scaled_in_the_next_step_alone():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([1.0])
    optimizer = plain(weight)

    optimizer.scale_gradients(0.25)
    optimizer.step()
    assert weight.item() == 2.0 - 0.5 * 0.25

    optimizer.step()
    assert weight.item() == 2.0 - 0.5 * 1.25
