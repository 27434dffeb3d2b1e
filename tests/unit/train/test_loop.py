import os
import signal

import pytest
import torch

from stoker.checkpoint.read import load_latest
from stoker.errors import CheckpointError, TrainingError
from stoker.observe.events import CheckpointSaved, Evaluated, Notice, RunEnded, RunStarted, StepLogged
from stoker.optim import optimizers
from stoker.train.loop import Trainer
from stoker.train.settings import Checkpoints, EarlyStopping, Every, LossLimit


class StopsAfter:
    """Kills a run, as far as the run can tell, once `step` is logged."""

    def __init__(self, step):
        self.step = step

    def handle(self, event):
        if isinstance(event, StepLogged) and event.step == self.step:
            raise KilledError

    def close(self):
        pass


class KilledError(Exception):
    """Stands for the end of the process."""


class InterruptsAfter(StopsAfter):
    """Sends this process SIGTERM once `step` is logged."""

    def handle(self, event):
        if isinstance(event, StepLogged) and event.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def steps_in(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def figures(recorder):
    """What a run logged, without the times, memory and the like that no run repeats."""
    steps = [
        (e.step, e.epoch, e.loss, e.learning_rate, e.gradient_norm, e.num_tokens, e.num_trained_tokens)
        for e in recorder.of(StepLogged)
    ]
    return steps, [(e.step, e.loss, e.best) for e in recorder.of(Evaluated)]


def scripted(monkeypatch, losses):
    """Makes evaluations return `losses` in turn."""
    from stoker.train import loop
    from stoker.train.evaluate import Evaluation

    left = iter(losses)
    monkeypatch.setattr(loop, "evaluate_unless", lambda *arguments: Evaluation(next(left), 10, 0.0))


@pytest.fixture
def make(toy, tmp_path):
    """Returns (trainer, strategy, recorder) of a fresh process's worth of objects."""

    def build(*, kind="adamw", precision="fp32", seed=0, validation=True, observers=(), loader=None, **options):
        torch.manual_seed(1234 + seed)
        strategy, _ = toy.make_strategy(kind=kind, dropout=0.3, precision=precision, seed=seed)
        recorder = toy.Recorder()
        loader = loader or toy.ToyLoader(micro_batch_size=4)
        checkpoints = options.pop("checkpoints", Checkpoints(tmp_path / "checkpoints", Every(steps=2), keep_last=3))
        trainer = Trainer(
            strategy,
            loader,
            settings=toy.make_settings(**{"evaluate": Every(steps=3), **options}),
            validation=(lambda: loader.step(3)) if validation else None,
            checkpoints=checkpoints,
            observers=[recorder, *observers],
            description={"model": "toy"},
        )
        return trainer, strategy, recorder

    return build


def test_a_run_logs_each_step_evaluates_saves_and_ends(make, tmp_path):
    trainer, _, recorder = make()
    result = trainer.run()
    started, ended = recorder.events[0], recorder.events[-1]
    assert started == RunStarted(8, 0, 4, {"model": "toy"})
    assert isinstance(ended, RunEnded)
    assert (ended.step, ended.reason) == (8, "finished")
    logged = recorder.of(StepLogged)
    assert [event.step for event in logged] == list(range(1, 9))
    assert [event.epoch for event in logged] == [step / 4 for step in range(1, 9)]
    assert logged[-1].loss < logged[0].loss
    assert [event.learning_rate for event in logged[:3]] == [0.005, 0.01, 0.01]
    assert all(event.padding_share == 0 and event.tokens_per_second > 0 for event in logged)
    assert [event.step for event in recorder.of(Evaluated)] == [3, 6, 8]  # The last step is always evaluated.
    assert result.reason == "finished"
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000008"
    assert recorder.of(CheckpointSaved)[-1].folder == result.checkpoint


class TestResume:
    @pytest.mark.parametrize("kind", optimizers.KINDS)
    def test_a_killed_and_resumed_run_equals_an_unbroken_one_bit_for_bit(self, make, tmp_path, kind):
        trainer, unbroken, expected = make(kind=kind, checkpoints=Checkpoints(tmp_path / "unbroken", Every(steps=2)))
        trainer.run()
        trainer, _, killed = make(kind=kind, observers=[StopsAfter(5)])
        with pytest.raises(KilledError):
            trainer.run()
        trainer, resumed, went_on = make(kind=kind, seed=7)
        trainer.run(resume=True)
        first = went_on.events[0].first_step
        assert first == 4
        before = [[row for row in rows if row[0] <= first] for rows in figures(killed)]
        assert [a + b for a, b in zip(before, figures(went_on), strict=True)] == list(figures(expected))
        ours, theirs = resumed.state(), unbroken.state()
        assert all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.weights.items())
        assert set(ours.optimizer) == set(theirs.optimizer)
        assert all(torch.equal(ours.optimizer[name], tensor) for name, tensor in theirs.optimizer.items())
        assert ours.values == theirs.values

    def test_dropout_goes_on_with_the_numbers_that_would_have_come(self, make):
        """Without the random state the losses after a resume would differ: this shows that dropout is at work."""
        make(checkpoints=None)[0].run()
        trainer, _, one = make(checkpoints=None)
        trainer.run()
        trainer, _, other = make(checkpoints=None)
        torch.manual_seed(99)
        trainer.run()
        assert figures(one)[0] != figures(other)[0]

    def test_fp16_goes_on_with_its_loss_scale(self, make, tmp_path):
        trainer, unbroken, expected = make(precision="fp16", checkpoints=Checkpoints(tmp_path / "x", Every(steps=2)))
        trainer.run()
        with pytest.raises(KilledError):
            make(precision="fp16", observers=[StopsAfter(5)])[0].run()
        trainer, resumed, recorder = make(precision="fp16")
        trainer.run(resume=True)
        assert figures(recorder)[0] == figures(expected)[0][4:]
        assert resumed.state().values == unbroken.state().values

    @pytest.mark.parametrize("killed_at", [1, 2, 6, 8])
    def test_any_step_can_be_the_last(self, make, tmp_path, killed_at):
        trainer, _, expected = make(checkpoints=Checkpoints(tmp_path / "unbroken", Every(steps=2)))
        trainer.run()
        with pytest.raises(KilledError):
            make(observers=[StopsAfter(killed_at)])[0].run()
        trainer, _, recorder = make()
        trainer.run(resume=True)
        first = recorder.events[0].first_step
        assert first == (killed_at - 1) // 2 * 2 or first == 3
        assert figures(recorder)[0] == figures(expected)[0][first:]

    def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(self, make, tmp_path):
        trainer, unbroken, expected = make()
        trainer.run()
        weights = tmp_path / "checkpoints" / "step-000008" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        trainer, strategy, recorder = make(seed=3)
        result = trainer.run(resume=True)
        assert recorder.events[0].first_step == 6
        (warning,) = [event for event in recorder.of(Notice) if event.level == "warning"]
        assert "step-000008" in warning.message
        assert "weights.safetensors has" in warning.message
        assert "step-000008.damaged" in warning.message
        assert figures(recorder)[0] == figures(expected)[0][6:]
        assert torch.equal(strategy.state().weights["model.head.weight"], unbroken.state().weights["model.head.weight"])
        assert result.checkpoint == weights.parent

    def test_a_finished_run_resumed_does_nothing_more(self, make):
        make()[0].run()
        trainer, _, recorder = make()
        assert trainer.run(resume=True).reason == "finished"
        assert figures(recorder) == ([], [])
        assert recorder.of(CheckpointSaved) == []

    def test_without_a_checkpoint_it_starts_at_the_beginning_and_says_so(self, make):
        trainer, _, recorder = make()
        trainer.run(resume=True)
        assert "no checkpoint" in recorder.of(Notice)[0].message
        assert recorder.of(StepLogged)[0].step == 1

    def test_a_checkpoint_of_another_optimiser_is_refused(self, make):
        make(kind="sgd")[0].run()
        with pytest.raises(CheckpointError, match="state of SGD"):
            make(kind="adamw")[0].run(resume=True)

    def test_a_longer_run_goes_on_from_a_finished_one(self, make):
        make(total_steps=4)[0].run()
        trainer, _, recorder = make(total_steps=6)
        trainer.run(resume=True)
        assert [event.step for event in recorder.of(StepLogged)] == [5, 6]


class TestCheckpoints:
    def test_the_last_few_and_the_best_stay(self, make, tmp_path, monkeypatch):
        scripted(monkeypatch, [2.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
        folder = tmp_path / "checkpoints"
        trainer, _, _ = make(evaluate=Every(steps=1), checkpoints=Checkpoints(folder, Every(steps=1), keep_last=2))
        result = trainer.run()
        assert steps_in(folder) == [2, 7, 8]
        assert (result.best_step, result.best_loss) == (2, 1.0)
        assert result.best_checkpoint == folder / "step-000002"

    def test_a_best_evaluation_is_saved_though_no_save_is_due(self, make, tmp_path, monkeypatch):
        scripted(monkeypatch, [2.0, 1.0, 3.0])
        trainer, _, _ = make(checkpoints=Checkpoints(tmp_path / "checkpoints", keep_last=1))
        trainer.run()
        assert steps_in(tmp_path / "checkpoints") == [6, 8]

    def test_the_best_is_not_kept_unless_asked(self, make, tmp_path, monkeypatch):
        scripted(monkeypatch, [1.0, 2.0, 3.0])
        trainer, _, _ = make(checkpoints=Checkpoints(tmp_path / "checkpoints", keep_last=1, keep_best=False))
        assert trainer.run().best_checkpoint is None
        assert steps_in(tmp_path / "checkpoints") == [8]

    def test_saves_fall_on_epochs(self, make, tmp_path):
        checkpoints = Checkpoints(tmp_path / "checkpoints", Every(epochs=1), keep_last=9)
        make(validation=False, total_steps=10, checkpoints=checkpoints)[0].run()
        assert steps_in(tmp_path / "checkpoints") == [4, 8, 10]

    def test_the_best_weights_can_be_loaded_back(self, make, monkeypatch):
        scripted(monkeypatch, [1.0, 2.0, 3.0])
        trainer, strategy, _ = make()
        result = trainer.run()
        from stoker.checkpoint.read import load

        best = load(result.best_checkpoint).tensors["weights"]
        assert not torch.equal(strategy.state().weights["model.head.weight"], best["model.head.weight"])
        strategy.load_weights(best)
        assert torch.equal(strategy.state().weights["model.head.weight"], best["model.head.weight"])

    def test_without_a_folder_nothing_is_saved(self, make, tmp_path):
        result = make(checkpoints=None)[0].run()
        assert result.checkpoint is None
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_save_ends_the_run_and_the_last_good_checkpoint_goes_on(self, make, tmp_path, monkeypatch):
        trainer, _, expected = make(checkpoints=Checkpoints(tmp_path / "unbroken", Every(steps=2)))
        trainer.run()
        from stoker.checkpoint import durable

        write, full_from = os.write, 4
        checkpoints = Checkpoints(tmp_path / "checkpoints", Every(steps=2), background=False)
        trainer, _, recorder = make(checkpoints=checkpoints)

        def disk_is_full(descriptor, data):
            if trainer.state.step >= full_from:
                raise OSError(28, "No space left on device")
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "write", disk_is_full)
            with pytest.raises(CheckpointError, match="No space left on device"):
                trainer.run()
        assert recorder.events[-1].reason == "failed"
        assert load_latest(tmp_path / "checkpoints").step == 3
        trainer, _, recorder = make()
        trainer.run(resume=True)
        assert figures(recorder)[0] == figures(expected)[0][3:]


class TestEvaluation:
    def test_falls_on_epochs_and_the_end(self, make):
        trainer, _, recorder = make(total_steps=10, evaluate=Every(epochs=1))
        trainer.run()
        assert [event.step for event in recorder.of(Evaluated)] == [4, 8, 10]

    def test_does_not_change_what_is_trained(self, make):
        trainer, with_evaluation, _ = make(evaluate=Every(steps=1))
        trainer.run()
        trainer, without, _ = make(validation=False, checkpoints=None)
        trainer.run()
        for name, tensor in without.state().weights.items():
            assert torch.equal(with_evaluation.state().weights[name], tensor)

    def test_the_best_so_far_is_marked(self, make, monkeypatch):
        scripted(monkeypatch, [2.0, 3.0, 1.0])
        trainer, _, recorder = make()
        trainer.run()
        assert [(event.step, event.best) for event in recorder.of(Evaluated)] == [(3, True), (6, False), (8, True)]

    def test_a_loss_that_is_not_finite_stops(self, make, monkeypatch):
        scripted(monkeypatch, [float("nan")])
        with pytest.raises(TrainingError, match="validation loss of step 3 is nan"):
            make()[0].run()


class TestEarlyStopping:
    LOSSES = (5.0, 4.0, 4.5, 4.1, 1.0, 1.0, 1.0, 1.0)

    def test_ends_after_patience_evaluations_without_improvement(self, make, monkeypatch):
        scripted(monkeypatch, self.LOSSES)
        trainer, _, recorder = make(evaluate=Every(steps=1), early_stopping=EarlyStopping(2))
        result = trainer.run()
        assert (result.step, result.reason, result.best_step) == (4, "early stopping", 2)
        assert recorder.events[-1].reason == "early stopping"
        assert load_latest(result.checkpoint.parent).step == 4

    def test_counts_on_across_a_resume(self, make, monkeypatch):
        options = {"evaluate": Every(steps=1), "early_stopping": EarlyStopping(2)}
        scripted(monkeypatch, self.LOSSES[:3])
        trainer, _, _ = make(**options, observers=[InterruptsAfter(3)])
        trainer.run()
        scripted(monkeypatch, self.LOSSES[3:])
        trainer, _, _ = make(**options)
        result = trainer.run(resume=True)
        assert (result.step, result.reason) == (4, "early stopping")

    def test_a_stopped_run_resumed_stays_stopped(self, make, monkeypatch):
        options = {"evaluate": Every(steps=1), "early_stopping": EarlyStopping(2)}
        scripted(monkeypatch, self.LOSSES)
        make(**options)[0].run()
        trainer, _, recorder = make(**options)
        assert trainer.run(resume=True).reason == "early stopping"
        assert recorder.of(StepLogged) == []

    def test_without_validation_is_refused(self, make):
        with pytest.raises(ValueError, match="needs validation"):
            make(validation=False, early_stopping=EarlyStopping(1))


class TestInterrupt:
    def test_the_step_is_finished_and_saved_and_a_resume_equals_an_unbroken_run(self, make, tmp_path):
        trainer, _, expected = make(checkpoints=Checkpoints(tmp_path / "unbroken", Every(steps=2)))
        trainer.run()
        trainer, _, first = make(observers=[InterruptsAfter(5)])
        result = trainer.run()
        assert (result.reason, result.step, result.interrupted_by) == ("interrupted", 5, "SIGTERM")
        assert result.checkpoint.name == "step-000005"
        trainer, _, second = make()
        trainer.run(resume=True)
        combined = [a + b for a, b in zip(figures(first), figures(second), strict=True)]
        assert combined == list(figures(expected))

    def test_an_evaluation_that_it_cuts_off_is_done_first_on_resume(self, make, tmp_path):
        trainer, _, expected = make(checkpoints=Checkpoints(tmp_path / "unbroken", Every(steps=2)))
        trainer.run()
        trainer, _, first = make(observers=[InterruptsAfter(3)])
        assert trainer.run().step == 3
        assert first.of(Evaluated) == []
        trainer, _, second = make()
        trainer.run(resume=True)
        assert figures(second)[1] == figures(expected)[1]
        assert figures(second)[0] == figures(expected)[0][3:]

    def test_in_the_last_evaluation_leaves_it_to_the_resumed_run(self, make):
        trainer, _, _ = make(observers=[InterruptsAfter(8)])
        assert trainer.run().reason == "interrupted"
        trainer, _, recorder = make()
        assert trainer.run(resume=True).reason == "finished"
        assert [event.step for event in recorder.of(Evaluated)] == [8]

    def test_a_trainer_can_be_run_again_after_it(self, make):
        trainer, _, _ = make(observers=[InterruptsAfter(5)])
        trainer.run()
        assert trainer.run(resume=True).reason == "finished"

    def test_told_to_another_rank_ends_this_one_too(self, make, monkeypatch):
        trainer, strategy, _ = make(validation=False)
        monkeypatch.setattr(strategy, "sum_over_ranks", lambda values: [value + 1 for value in values])
        result = trainer.run()
        assert (result.reason, result.step) == ("interrupted", 0)


def test_only_every_so_many_steps_are_logged_and_the_last(make):
    trainer, _, recorder = make(log_every_steps=3)
    trainer.run()
    assert [event.step for event in recorder.of(StepLogged)] == [3, 6, 8]


def test_memory_that_ran_out_once_is_remembered_across_a_resume(make):
    trainer, _, _ = make(total_steps=4)
    trainer._guard.max_positions = 12
    trainer.run()
    trainer, strategy, _ = make(total_steps=6)
    sizes = []
    forward_backward = strategy.forward_backward
    strategy.forward_backward = lambda batch, **options: (
        sizes.append(batch.input_ids.numel()),
        forward_backward(batch, **options),
    )[1]
    trainer.run(resume=True)
    assert sizes == [12] * 8


def test_a_failure_is_announced_before_it_is_raised(make):
    trainer, strategy, recorder = make()
    strategy.load_weights({name: tensor * float("nan") for name, tensor in strategy.state().weights.items()})
    with pytest.raises(TrainingError, match="step 1"):
        trainer.run()
    assert recorder.events[-1].reason == "failed"


def test_a_run_whose_loss_stays_high_ends_in_an_error(make):
    trainer, _, recorder = make(total_steps=8, loss_limit=LossLimit(0.01, patience=3))

    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.run()

    assert [event.step for event in recorder.of(StepLogged)] == [1, 2, 3]
