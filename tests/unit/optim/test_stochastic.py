"""AdamW over bf16 weights: it learns as in fp32, and goes on from a saved state bit for bit."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from stoker.distributed.single import SingleDevice
from stoker.distributed.strategy import StrategyState
from stoker.kernels.adamw import AdamWStep, adamw_
from stoker.optim import optimizers
from stoker.optim.stochastic import StochasticAdamW
from stoker.tasks.task import TaskResult


def update(weight, grad, average, square, *, number, betas, seed=3, **values):
    numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
    adamw_(weight, grad, average, square, numbers, seed=seed, number=number)


class Batch:
    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(64, (128,), generator=generator)

    def to(self, device):
        return self


class Bigrams(nn.Module):
    """A two-layer model of a fixed permutation: the token after i is a function of i."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        self.hidden = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 64, bias=False)
        self.next = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)

    def forward(self, batch):
        # In fp32 whatever the weights are kept in: what differs between two runs is how weights are kept alone.
        hidden = nn.functional.embedding(batch.ids, self.embedding.weight).float()
        hidden = torch.relu(nn.functional.linear(hidden, self.hidden.weight.float(), self.hidden.bias))
        logits = nn.functional.linear(self.norm(hidden), self.head.weight.float())
        loss = nn.functional.cross_entropy(logits, self.next[batch.ids], reduction="sum")
        return TaskResult(loss, len(batch.ids), {})


def strategy_of(dtype=torch.bfloat16, *, stochastic=True, learning_rate=3e-4):
    strategy, task = SingleDevice("cpu"), Bigrams(dtype)
    if stochastic:
        make = partial(optimizers.build, kind="adamw", learning_rate=learning_rate, rounded_update=update)
    else:  # every new value rounded to the nearest, as torch's AdamW does in bf16

        def make(named):
            return torch.optim.AdamW([one for _, one in named], lr=learning_rate, weight_decay=0.0, foreach=False)

    strategy.prepare(task, make)
    return strategy, task


def losses(strategy, steps, first=0, learning_rate=3e-4):
    found = []
    for index in range(first, first + steps):
        result = strategy.forward_backward(Batch(index), divisor=128.0, is_last=True)
        found.append(float(result.loss_sum) / 128)
        strategy.step(learning_rate, max_gradient_norm=1.0)
    return found


@pytest.mark.slow
def test_200_steps_follow_fp32_where_the_nearest_rounding_falls_behind():
    """The bound is 1% of the loss at any step (found: 0.5%); rounding to the nearest is off by 70% at the end."""
    exact = losses(strategy_of(torch.float32, stochastic=False)[0], 200)
    rounded = losses(strategy_of()[0], 200)
    nearest = losses(strategy_of(stochastic=False)[0], 200)
    assert exact[-1] < 0.8 * exact[0]
    distance = max(abs(one - true) / true for one, true in zip(rounded, exact, strict=True))
    behind = max(abs(one - true) / true for one, true in zip(nearest, exact, strict=True))
    assert distance < 0.01
    assert behind > 0.3


def test_a_resumed_run_draws_the_same_bits():
    unbroken, task = strategy_of()
    losses(unbroken, 6)
    state = copy.deepcopy(unbroken.state())
    assert {tensor.dtype for name, tensor in state.optimizer.items() if "hidden.weight" in name} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in state.optimizer.items() if "norm" in name} == {torch.float32}
    resumed, other = strategy_of()
    resumed.load_state(StrategyState(state.weights, state.optimizer, state.values))
    assert losses(unbroken, 5, first=6) == losses(resumed, 5, first=6)
    for one, two in zip(task.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for name, tensor in unbroken.state().optimizer.items():
        assert torch.equal(tensor, resumed.state().optimizer[name]), name


def test_clipping_happens_in_the_step_and_leaves_gradients_as_they_are():
    strategy, task = strategy_of()
    seen = []
    strategy._optimizer._update = lambda weight, grad, *_, gradient_scale, **__: seen.append(gradient_scale)
    strategy.forward_backward(Batch(0), divisor=1.0, is_last=True)
    before = task.head.weight.grad.clone()
    grads = torch.cat([one.grad.double().flatten() for one in task.parameters()])
    gradient = task.head.weight.grad
    norm = strategy.step(1e-3, max_gradient_norm=0.5).gradient_norm
    assert norm == pytest.approx(grads.norm().item(), rel=1e-5)
    assert torch.equal(gradient, before)
    assert seen == pytest.approx([0.5 / norm] * len(seen), rel=1e-5)


def test_parameters_of_one_step_and_their_steps_differ_in_their_bits():
    weights = [nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = StochasticAdamW([{"params": weights}], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, update=update)
    seen = []
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        seen += [weight.detach() - old for weight, old in zip(weights, before, strict=True)]
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_bf16_weights_without_stochastic_rounding_are_refused():
    named = [("weight", nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)))]
    with pytest.raises(ValueError, match="lose small updates"):
        optimizers.build(named, kind="adamw", learning_rate=1e-3)
    with pytest.raises(ValueError, match="only adamw rounds"):
        optimizers.build(named, kind="sgd", learning_rate=1e-3, rounded_update=update)
