"""A rehearsed first micro-batch leaves no trace in the numbers."""

import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from stoker.distributed.rehearsal import Rehearsal
from stoker.distributed.single import SingleDevice
from stoker.optim import optimizers


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_first_micro_batch_is_rehearsed_once_and_nothing_changes(toy_strategy, toy_batch, precision):
    entered, calls = [], []

    @contextmanager
    def rehearsing():
        entered.append(len(calls))
        yield
        entered.append(len(calls))

    plain, _ = toy_strategy(precision=precision, dropout=0.5)
    _, task = toy_strategy(precision=precision, dropout=0.5)
    rehearsed = SingleDevice("cpu", precision=precision, rehearsing=rehearsing)
    rehearsed.prepare(task, partial(optimizers.build, kind="adamw", learning_rate=1e-2))
    task.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0].x)))
    norms = []
    for strategy in (plain, rehearsed):
        torch.manual_seed(5)
        for number in range(3):
            strategy.forward_backward(toy_batch(4, seed=number), divisor=32.0, is_last=True)
            norms.append(strategy.step(1e-2, max_gradient_norm=1.0).gradient_norm)
    assert norms[:3] == norms[3:]
    assert entered == [0, 1]
    assert calls == [1, 4, 4, 4]  # the rehearsal's is the shortened batch
    assert rehearsed.rehearsal is None  # nothing was asked for
    for name, weight in plain.state().weights.items():
        assert torch.equal(rehearsed.state().weights[name], weight)


def test_memory_that_runs_out_in_a_rehearsal_is_the_micro_batchs_own_failure(toy_strategy, toy_batch):
    @contextmanager
    def rehearsing():
        yield
        raise torch.OutOfMemoryError("out of memory")

    _, task = toy_strategy()
    strategy = SingleDevice("cpu", rehearsing=rehearsing)
    strategy.prepare(task, partial(optimizers.build, kind="adamw", learning_rate=1e-2))
    with pytest.raises(torch.OutOfMemoryError):
        strategy.forward_backward(toy_batch(4), divisor=32.0, is_last=True)
    strategy.discard_gradients()
    strategy.forward_backward(toy_batch(2), divisor=16.0, is_last=True)  # not rehearsed again
    assert strategy.step(1e-2, max_gradient_norm=1.0).gradient_norm > 0


def test_what_a_rehearsal_took_is_told(toy_strategy, toy_batch):
    @contextmanager
    def rehearsing():
        yield SimpleNamespace(num_kernels=27, num_threads=16)
        time.sleep(0.02)

    _, task = toy_strategy()
    strategy = SingleDevice("cpu", rehearsing=rehearsing)
    strategy.prepare(task, partial(optimizers.build, kind="adamw", learning_rate=1e-2))
    strategy.forward_backward(toy_batch(4), divisor=32.0, is_last=True)
    found = strategy.rehearsal
    assert found.num_kernels == 27
    assert found.waiting_seconds >= 0.02
    assert found.asking_seconds > 0


def test_a_rehearsal_in_words():
    expected = "3.2 s of rehearsal: 2.1 asking for 27 kernels, 1.1 more until 16 threads had them"
    assert Rehearsal(2.1, 1.1, 27, 16).describe() == expected
