"""A step with one flat gradient is the step with a list of them."""

from functools import partial

import pytest
import torch

from stoker.distributed.flat_gradient import FlatGradient
from stoker.distributed.single import SingleDevice
from stoker.optim import optimizers


@pytest.fixture
def pair(toy_strategy):
    """The same task under the list's AdamW and under the flat one."""

    def make(precision="fp32"):
        listed, _ = toy_strategy(precision=precision)
        other, task = toy_strategy(precision=precision)
        flat = SingleDevice("cpu", precision=precision)
        flat.prepare(task, partial(optimizers.build, kind="adamw", learning_rate=1e-2, flat=True))
        del other
        return listed, flat

    return make


def run(strategy, toy_batch, *, steps=4, max_norm=1.0):
    norms = []
    for step in range(steps):
        for part in range(3):
            strategy.forward_backward(toy_batch(4, seed=3 * step + part), divisor=96.0, is_last=part == 2)
        norms.append(strategy.step(1e-2, max_gradient_norm=max_norm).gradient_norm)
    return norms


def assert_same(listed, flat):
    ours, theirs = flat.state(), listed.state()
    assert ours.values == theirs.values
    for mine, other in ((ours.weights, theirs.weights), (ours.optimizer, theirs.optimizer)):
        assert set(mine) == set(other)
        for name, tensor in other.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_steps_of_several_micro_batches_are_the_same(pair, toy_batch, precision, max_norm):
    listed, flat = pair(precision)
    expected = run(listed, toy_batch, max_norm=max_norm)
    assert run(flat, toy_batch, max_norm=max_norm) == pytest.approx(expected, rel=1e-5)
    assert_same(listed, flat)


def test_either_goes_on_from_the_others_state(pair, toy_batch):
    listed, flat = pair()
    run(listed, toy_batch)
    flat.load_state(listed.state())
    run(listed, toy_batch, steps=2)
    run(flat, toy_batch, steps=2)
    assert_same(listed, flat)
    listed.load_state(flat.state())
    run(listed, toy_batch, steps=1)
    run(flat, toy_batch, steps=1)
    assert_same(listed, flat)


def test_discarded_gradients_are_gone(pair, toy_batch):
    listed, flat = pair()
    flat.forward_backward(toy_batch(4, seed=99), divisor=1.0, is_last=False)
    flat.discard_gradients()
    run(listed, toy_batch, steps=1)
    run(flat, toy_batch, steps=1)
    assert_same(listed, flat)


def test_a_gradient_that_is_not_finite_is_skipped_and_forgotten(pair, toy_batch):
    listed, flat = pair()
    bad = toy_batch(4)
    bad.x[0, 0] = float("nan")
    flat.forward_backward(bad, divisor=1.0, is_last=True)
    assert flat.step(1e-2, max_gradient_norm=1.0).skipped
    run(listed, toy_batch, steps=1)
    run(flat, toy_batch, steps=1)
    assert_same(listed, flat)


def test_memory_that_the_next_micro_batch_overwrites_is_copied():
    class Optimizer:
        def set_gradient(self, gradient):
            self.gradient = gradient

    optimizer = Optimizer()
    flat, buffer = FlatGradient(optimizer), torch.full((4,), 1.0)
    flat.add(buffer, is_last=False, is_reused=True)
    buffer.fill_(2.0)
    flat.add(buffer, is_last=True, is_reused=True)
    flat.hand_over(shown=False)
    assert optimizer.gradient.tolist() == [3.0] * 4
    assert flat.norm() == 6.0
    flat.clear()
    flat.add(buffer, is_last=True, is_reused=True)
    flat.hand_over(shown=False)
    assert optimizer.gradient is buffer  # one micro-batch a step: nothing to copy
    flat.clear()
    with pytest.raises(RuntimeError, match="no micro-batch"):
        flat.hand_over(shown=False)
