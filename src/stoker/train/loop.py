"""The training loop: step, evaluate, save, until done, out of patience or interrupted."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stoker.checkpoint import rng
from stoker.checkpoint.folder import set_aside
from stoker.checkpoint.keep import keep
from stoker.checkpoint.manifest import fault_of
from stoker.checkpoint.read import Loaded, load_latest
from stoker.checkpoint.saver import Saver
from stoker.distributed.strategy import Strategy, StrategyState
from stoker.errors import CheckpointError
from stoker.observe.events import CheckpointSaved, Evaluated, Event, Notice, RunEnded, RunStarted, StepLogged
from stoker.observe.observer import Observer
from stoker.train.batches import Batches, StepSource, Streamed, rows_of
from stoker.train.evaluate import evaluate_unless
from stoker.train.guard import LossGuard, MemoryGuard, check_finite
from stoker.train.interrupt import Interrupt
from stoker.train.settings import Checkpoints, Settings
from stoker.train.state import TrainState
from stoker.train.step import StepOutcome, take_step
from stoker.train.warm_up import WarmUp


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended. `reason` is "finished", "early stopping" or "interrupted" (by the signal `interrupted_by`).

    `checkpoint` is the last one saved, `best_checkpoint` that of the lowest validation loss, when it was kept.
    """

    step: int
    reason: str
    seconds: float
    best_step: int
    best_loss: float | None
    checkpoint: Path | None
    best_checkpoint: Path | None
    interrupted_by: str = ""


class Trainer:
    """Trains what `strategy` was prepared with, on the micro-batches of `batches`.

    `validation` returns the batches to evaluate on; without it there is no evaluation. Without `checkpoints` nothing is
    saved. `observers` receive every event; whoever made them closes them. `at` is told the phase that begins and how
    many steps are finished.
    """

    def __init__(
        self,
        strategy: Strategy,
        batches: StepSource,
        *,
        settings: Settings,
        validation: Batches | None = None,
        checkpoints: Checkpoints | None = None,
        observers: Sequence[Observer] = (),
        description: Mapping[str, str] | None = None,
        relieve: Callable[[], str] = lambda: "",
        at: Callable[[str, int], None] = lambda phase, finished: None,
    ) -> None:
        if settings.early_stopping is not None and validation is None:
            raise ValueError("early stopping needs validation batches")
        self.state = TrainState()
        self._strategy = strategy
        self._batches = batches
        self._settings = settings
        self._validation = validation
        self._checkpoints = checkpoints
        self._observers = tuple(observers)
        self._description = dict(description or {})
        self._tell = at
        self._guard = MemoryGuard(strategy, self._warn, relieve=relieve, at=self._at)
        self._loss_guard = LossGuard(settings.loss_limit)
        self._interrupt = self._listen()
        self._saver: Saver | None = None
        if checkpoints is not None:
            self._saver = Saver(
                checkpoints.folder,
                rank=strategy.rank,
                world_size=strategy.world_size,
                gather=strategy.gather_over_ranks,
                background=checkpoints.background,
            )
        self._saved: tuple[int, int] | None = None
        self._last_checkpoint: Path | None = None
        self._window_tokens, self._window_seconds = 0, 0.0
        self._warm_up = WarmUp(settings.warm_up_reason)

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Trains from the start, or from the latest whole checkpoint when `resume`, and returns how it ended.

        On a CPU a resumed run repeats an unbroken one bit for bit. SIGTERM and Ctrl-C end the run after the current
        step, with a checkpoint.

        Raises:
            TrainingError: the loss or a gradient is not finite, the loss stays above its limit, or memory is exhausted
                with a single document.
            CheckpointError: a checkpoint cannot be written (the last good one stands) or none can be read.
            DataError: the validation rows hold no trained token.
        """
        started, reason = time.perf_counter(), "failed"
        self._interrupt = self._listen()
        notices = self._resume() if resume else []
        self._emit(
            RunStarted(self._settings.total_steps, self.state.step, self._batches.steps_per_epoch, self._description)
        )
        for notice in notices:
            self._emit(notice)
        try:
            with self._interrupt:
                reason = self._train()
        except KeyboardInterrupt:
            reason = "interrupted"
            raise
        except Exception:
            self._finish_alone()
            raise
        finally:
            seconds = time.perf_counter() - started
            self._emit(RunEnded(self.state.step, reason, seconds))
        return self._result(reason, seconds)

    def _train(self) -> str:
        while True:
            self._evaluate_if_due()
            reason = self._reason_to_end()
            self._settle(wait=False)
            if reason or self._is_save_due():
                self._save()
            if reason:
                self._settle(wait=True)
                return reason
            self._step()

    def _step(self) -> None:
        started = time.perf_counter()
        index = self.state.step
        learning_rate = self._settings.learning_rate * self._settings.schedule(index)
        self._at("reading data")
        batches = self._batches.step(index)
        outcome = take_step(
            self._strategy,
            batches,
            number=index + 1,
            learning_rate=learning_rate,
            max_gradient_norm=self._settings.max_gradient_norm,
            guard=self._guard,
            notify=self._warn,
            at=self._at,
            rows=lambda: rows_of(self._batches, index),
        )
        self.state.step = index + 1
        self.state.max_positions, self.state.fitted_positions = self._guard.max_positions, self._guard.fitted_positions
        self.state.num_trained_tokens += outcome.num_trained_tokens
        seconds = time.perf_counter() - started
        self._log(outcome, learning_rate, seconds)
        if sentence := self._warm_up.after(seconds, self._strategy.rehearsal):
            self._emit(Notice(sentence))
        self._loss_guard.check(outcome.loss, self.state.step)

    def _log(self, outcome: StepOutcome, learning_rate: float, seconds: float) -> None:
        """Emits the step's own figures; the speed is that of all steps since the last line."""
        step, total = self.state.step, self._settings.total_steps
        self._window_tokens += outcome.num_tokens
        self._window_seconds += seconds
        if step % self._settings.log_every_steps and step != total:
            return
        self._emit(
            StepLogged(
                step=step,
                total_steps=total,
                epoch=step / self._batches.steps_per_epoch,
                loss=outcome.loss,
                learning_rate=learning_rate,
                gradient_norm=outcome.gradient_norm,
                num_tokens=outcome.num_tokens,
                num_trained_tokens=outcome.num_trained_tokens,
                padding_share=1.0 - outcome.num_tokens / outcome.num_positions,
                tokens_per_second=self._window_tokens / max(self._window_seconds, 1e-9),
                memory_bytes=self._strategy.peak_memory_bytes(),
                seconds=seconds,
                metrics=outcome.metrics,
            )
        )
        self._window_tokens, self._window_seconds = 0, 0.0

    # Evaluation

    def _evaluate_if_due(self) -> None:
        if self._validation is None or not self._is_evaluation_due():
            return
        evaluation = evaluate_unless(self._is_interrupted, self._guard, self._strategy, self._validation())
        if evaluation is None:
            return  # The resumed run evaluates this step first.
        check_finite(evaluation.loss, self.state.step, what="validation loss")
        early_stopping = self._settings.early_stopping
        is_best = self.state.note_evaluation(evaluation.loss, early_stopping.min_improvement if early_stopping else 0.0)
        self._emit(
            Evaluated(self.state.step, evaluation.loss, evaluation.num_trained_tokens, evaluation.seconds, best=is_best)
        )

    def _is_evaluation_due(self) -> bool:
        step = self.state.step
        if step in (0, self.state.evaluated_step):
            return False
        return step >= self._settings.total_steps or self._settings.evaluate.is_due(step, self._batches.steps_per_epoch)

    def _reason_to_end(self) -> str | None:
        evaluation_is_open = self._validation is not None and self._is_evaluation_due()
        if self.state.step >= self._settings.total_steps and not evaluation_is_open:
            return "finished"
        if self.state.is_out_of_patience(self._settings.early_stopping):
            return "early stopping"
        return "interrupted" if self._is_interrupted() else None

    def _listen(self) -> Interrupt:
        return Interrupt(speaks=self._strategy.rank == 0)

    def _is_interrupted(self) -> bool:
        """Whether any rank was told to stop: all ranks must leave after the same step."""
        self._at("asking all ranks whether to stop")
        return self._strategy.sum_over_ranks([float(self._interrupt.requested)])[0] > 0

    # Checkpoints

    def _is_save_due(self) -> bool:
        if self._checkpoints is None:
            return False
        is_best = self._checkpoints.keep_best and 0 < self.state.best_step == self.state.step
        return is_best or self._checkpoints.every.is_due(self.state.step, self._batches.steps_per_epoch)

    def _save(self) -> None:
        """Begins to save, beside the steps that follow; what is still being saved is finished first."""
        position = (self.state.step, self.state.evaluated_step)
        if self._checkpoints is None or self._saver is None or self._saved == position:
            return
        self._settle(wait=True)
        self._at("gathering a checkpoint")
        state = self._strategy.shared_state()
        tensors: dict[str, Mapping[str, Tensor]] = {"weights": state.weights, "optimizer": state.optimizer}
        values = {"train": self.state.to_values(), "strategy": state.values} | self._position()
        for rank, (rng_tensors, rng_values) in enumerate(self._strategy.gather_over_ranks(rng.state())):
            tensors[_rng_name(rank)], values[_rng_name(rank)] = rng_tensors, rng_values
        self._saver.begin(self.state.step, tensors=tensors, values=values)
        self._saved = position
        self._settle(wait=False)  # where steps had to wait for it, it is written

    def _settle(self, *, wait: bool) -> None:
        """Makes a checkpoint of what every rank has written, if it has; `wait`s for it where it must stand now.

        Raises:
            CheckpointError: a rank could not write; the checkpoints before stand.
        """
        saver, checkpoints = self._saver, self._checkpoints
        if saver is None or checkpoints is None or saver.step is None:
            return
        if not wait and self._strategy.sum_over_ranks([float(not saver.is_written)])[0]:
            return
        self._at("writing a checkpoint")
        saved = saver.commit()
        self._last_checkpoint = saved.path
        if self._strategy.rank == 0:
            best = [self.state.best_step] if checkpoints.keep_best and self.state.best_step else []
            keep(checkpoints.folder, last=checkpoints.keep_last, steps=best)
        self._emit(CheckpointSaved(saved.step, saved.path, saved.seconds, saved.num_bytes))

    def _finish_alone(self) -> None:
        """Lets a checkpoint that was being written when the run failed stand, where no other rank is needed for it."""
        if self._strategy.world_size == 1:
            with suppress(CheckpointError):
                self._settle(wait=True)

    def _resume(self) -> list[Notice]:
        loaded = load_latest(self._checkpoints.folder, find_fault=self._fault_of) if self._checkpoints else None
        if loaded is None:
            return [Notice("There is no checkpoint to resume from yet; starting at the beginning.")]
        notices = []
        self._strategy.sum_over_ranks([0.0])  # all have read before anything is renamed
        for rejected in loaded.rejected if self._strategy.rank == 0 else ():
            aside = set_aside(rejected.path)
            notices.append(Notice(f"A checkpoint is not whole: {rejected}. Set aside as {aside.name}.", "warning"))
        self._restore(loaded)
        return [*notices, Notice(f"Resuming from {loaded.path} after step {loaded.step}.")]

    def _fault_of(self, path: Path, step: int) -> str | None:
        """What is wrong with a checkpoint: each rank reads its share of the files."""
        share = self._strategy.rank, self._strategy.world_size
        faults = self._strategy.gather_over_ranks(fault_of(path, step, share=share))
        return next((fault for fault in faults if fault), None)

    def _position(self) -> dict[str, Any]:
        """Where a stream of batches stands; other batches need only the step's number."""
        return {"batches": self._batches.position()} if isinstance(self._batches, Streamed) else {}

    def _restore(self, loaded: Loaded) -> None:
        self.state = TrainState.from_values(loaded.values["train"])
        self._guard.max_positions, self._guard.fitted_positions = self.state.max_positions, self.state.fitted_positions
        self._strategy.load_state(
            StrategyState(loaded.tensors["weights"], loaded.tensors.get("optimizer", {}), loaded.values["strategy"])
        )
        name = _rng_name(self._strategy.rank)
        if name in loaded.values:  # Not with more ranks than wrote it: theirs stay as they were seeded.
            rng.restore(loaded.tensors[name], loaded.values[name])
        if isinstance(self._batches, Streamed):
            self._batches.seek(self.state.step, loaded.values["batches"])
        self._saved, self._last_checkpoint = (self.state.step, self.state.evaluated_step), loaded.path

    # Events

    def _at(self, phase: str) -> None:
        self._tell(phase, self.state.step)

    def _emit(self, event: Event) -> None:
        for observer in self._observers:
            observer.handle(event)

    def _warn(self, message: str) -> None:
        self._emit(Notice(message, level="warning"))

    def _result(self, reason: str, seconds: float) -> TrainingResult:
        best = None
        if self._checkpoints is not None and self.state.best_step:
            path = self._checkpoints.folder / f"step-{self.state.best_step:06d}"
            best = path if path.is_dir() else None
        return TrainingResult(
            step=self.state.step,
            reason=reason,
            seconds=seconds,
            best_step=self.state.best_step,
            best_loss=self.state.best_loss,
            checkpoint=self._last_checkpoint,
            best_checkpoint=best,
            interrupted_by=self._interrupt.name,
        )


def _rng_name(rank: int) -> str:
    return "rng" if rank == 0 else f"rng-{rank}"
