"""Optimisers on gradients that are given to them: the same ones on one device and on ranks that share the weights."""

import jobs
import torch

from stoker.tasks.supervised import SupervisedTask

KINDS = ("adamw_8bit", "adafactor", "muon", "sgd")
STEPS = 5


def given_gradients(ranks, kind, strategy_kind, name="8-bit mixture"):
    """Returns the state after some steps with the same gradients whoever takes them, and bytes that this rank holds."""
    model = jobs.build(jobs.CASES[name])
    strategy = jobs.make_strategy(strategy_kind, ranks, model)
    strategy.prepare(SupervisedTask(model), jobs.optimizer_of(kind))
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for name, parameter in strategy._trained.items():
            grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step - 3)
            grad *= torch.randn(parameter.shape, generator=generator).exp()
            parameter.grad = strategy._taken({name: grad}, name, parameter)
        strategy.step(1e-2, max_gradient_norm=None)
    held = strategy.shared_state().optimizer.values()
    held = sum(getattr(one, "_local_tensor", one).nbytes for one in held)
    return strategy.state(), ranks.gather(held) if ranks else [held]


def all_kinds(ranks):
    return {kind: given_gradients(ranks, kind, "fsdp2") for kind in KINDS}
