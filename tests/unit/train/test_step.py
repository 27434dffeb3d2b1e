import dataclasses

import pytest
import torch

from stoker.distributed.strategy import StepResult
from stoker.errors import TrainingError
from stoker.train.guard import MemoryGuard
from stoker.train.step import take_step


def run_step(strategy, batches, notices=None, guard=None):
    notify = [].append if notices is None else notices.append
    return take_step(
        strategy,
        batches,
        number=1,
        learning_rate=1e-2,
        max_gradient_norm=1.0,
        guard=guard or MemoryGuard(strategy, notify),
        notify=notify,
    )


def gradients_before_stepping(toy, batches, monkeypatch):
    strategy, task = toy.make_strategy()
    found = {}

    def capture(learning_rate, *, max_gradient_norm):
        found.update({name: parameter.grad.clone() for name, parameter in task.named_parameters()})
        return StepResult(1.0)

    monkeypatch.setattr(strategy, "step", capture)
    return run_step(strategy, batches), found


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_cutting_a_step_into_micro_batches_changes_neither_loss_nor_gradients(toy, monkeypatch, micro_batch_size):
    whole, expected = gradients_before_stepping(toy, toy.ToyLoader(micro_batch_size=8).step(0), monkeypatch)
    batches = toy.ToyLoader(micro_batch_size=micro_batch_size).step(0)
    assert len({batch.num_trained_tokens for batch in batches}) > 1  # Unequal, so a mean of means would differ.
    cut, found = gradients_before_stepping(toy, batches, monkeypatch)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert cut.num_trained_tokens == whole.num_trained_tokens
    for name, gradient in expected.items():
        # Only the order of fp32 sums differs: a few ulp of the largest entries.
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-5, msg=name)
        assert gradient.abs().max() > 1e-4


def test_loss_is_the_mean_over_the_trained_tokens_of_the_step(toy):
    strategy, task = toy.make_strategy()
    batches = toy.ToyLoader(micro_batch_size=2).step(0)
    with torch.no_grad():
        total = sum(task(batch).loss_sum.item() for batch in batches)
    outcome = run_step(strategy, batches)
    assert outcome.loss == pytest.approx(total / sum(batch.num_trained_tokens for batch in batches), rel=1e-6)
    assert outcome.num_tokens == outcome.num_positions == 48
    assert outcome.num_trained_tokens == sum(batch.num_trained_tokens for batch in batches)


def test_metrics_are_divided_as_the_loss_is(toy, monkeypatch):
    strategy, _ = toy.make_strategy()
    forward_backward = strategy.forward_backward

    def with_metric(batch, **options):
        result = forward_backward(batch, **options)
        return result._replace(metrics={"twice": 2 * result.loss_sum})

    monkeypatch.setattr(strategy, "forward_backward", with_metric)
    outcome = run_step(strategy, toy.ToyLoader(micro_batch_size=4).step(0))
    assert outcome.metrics == {"twice": pytest.approx(2 * outcome.loss)}


def test_counts_and_losses_of_other_ranks_are_part_of_the_step(toy, monkeypatch):
    strategy, _ = toy.make_strategy()
    alone = run_step(toy.make_strategy()[0], toy.ToyLoader().step(0))
    monkeypatch.setattr(strategy, "sum_over_ranks", lambda values: [2 * value for value in values])
    seen = []
    forward_backward = strategy.forward_backward
    monkeypatch.setattr(
        strategy,
        "forward_backward",
        lambda batch, **options: (seen.append(options), forward_backward(batch, **options))[1],
    )
    outcome = run_step(strategy, toy.ToyLoader().step(0))
    assert seen == [{"divisor": 2 * alone.num_trained_tokens, "is_last": True}]
    assert outcome.loss == pytest.approx(alone.loss)
    assert outcome.num_trained_tokens == 2 * alone.num_trained_tokens


def test_only_the_last_micro_batch_is_called_last(toy, monkeypatch):
    strategy, _ = toy.make_strategy()
    seen = []
    forward_backward = strategy.forward_backward
    monkeypatch.setattr(
        strategy,
        "forward_backward",
        lambda batch, **options: (seen.append(options["is_last"]), forward_backward(batch, **options))[1],
    )
    run_step(strategy, toy.ToyLoader(micro_batch_size=2).step(0))
    assert seen == [False, False, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(toy, value):
    strategy, task = toy.make_strategy()
    with torch.no_grad():
        task.model.head.weight[0, 0] = value
    before = task.model.hidden.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"training loss of step 1 is (nan|inf).*learning_rate"):
        run_step(strategy, toy.ToyLoader().step(0))
    assert torch.equal(task.model.hidden.weight, before)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(toy):
    strategy, task = toy.make_strategy()
    task.model.hidden.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = task.model.head.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"gradient norm of step 1 is (nan|inf)"):
        run_step(strategy, toy.ToyLoader().step(0))
    assert torch.equal(task.model.head.weight, before)


class TestLossScale:
    def test_an_overflow_tries_the_same_step_again_at_half_the_scale(self, toy):
        strategy, task = toy.make_strategy(precision="fp16")
        overflows = 2

        def overflow(gradient):
            nonlocal overflows
            overflows -= 1
            return gradient * float("inf") if overflows >= 0 else gradient

        task.model.hidden.weight.register_hook(overflow)
        reference, reference_task = toy.make_strategy(precision="fp16")
        notices = []
        outcome = run_step(strategy, toy.ToyLoader().step(0), notices)
        expected = run_step(reference, toy.ToyLoader().step(0))
        assert len(notices) == 2
        assert "step 1" in notices[0]
        assert "32768" in notices[0]
        assert outcome.loss == expected.loss
        state = strategy.state()
        assert state.values["loss_scale"]["scale"] == 65536 / 4
        assert state.optimizer["step:model.hidden.weight"] == 1
        # Scales are powers of two, but fp16's smallest numbers round differently under each.
        torch.testing.assert_close(task.model.head.weight, reference_task.model.head.weight, atol=1e-4, rtol=0)

    def test_an_overflow_that_no_scale_mends_stops(self, toy):
        strategy, task = toy.make_strategy(precision="fp16")
        task.model.hidden.weight.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(TrainingError, match="gradient norm"):
            run_step(strategy, toy.ToyLoader().step(0))


def test_a_step_without_a_trained_token_has_a_loss_of_zero(toy):
    strategy, _ = toy.make_strategy()
    (batch,) = toy.ToyLoader().step(0)
    empty = dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100), num_trained_tokens=0)
    outcome = run_step(strategy, [empty])
    assert outcome.loss == 0.0
    assert outcome.gradient_norm == 0.0
