"""Keeps a run from going on with numbers that mean nothing, and lets it go on when memory runs out."""

import gc
import math
from collections.abc import Callable, Sequence

import torch

from stoker.distributed.strategy import Result, Strategy
from stoker.errors import TrainingError
from stoker.train.batches import Batch
from stoker.train.settings import LossLimit

_REMEDY = (
    "Lower train.learning_rate, warm up longer or set train.max_gradient_norm; with engine.precision fp16, use bf16 or "
    "fp32. --resume goes on from the last checkpoint."
)

_SINGLE_REMEDY = "Set engine.recompute: input, lower data.sequence_length, or train an adapter of lower rank."

# How allocators other than CUDA's say it: torch raises a plain RuntimeError for these.
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def check_finite(loss: float, step: int, *, what: str = "training loss") -> None:
    """Raises TrainingError when `loss` is infinite or not a number."""
    if not math.isfinite(loss):
        raise loss_error(loss, step, what=what)


def loss_error(loss: float, step: int, culprits: str = "", *, what: str = "training loss") -> TrainingError:
    """Returns the error for a loss that is not finite; `culprits` are sentences on where it comes from."""
    return TrainingError(f"The {what} of step {step} is {loss}.{culprits}", fix=_REMEDY)


def gradient_error(gradient_norm: float, step: int) -> TrainingError:
    """Returns the error for a gradient that is not finite and that no lower loss scale has mended."""
    return TrainingError(
        f"The gradient norm of step {step} is {gradient_norm}; the weights were left alone.", fix=_REMEDY
    )


class LossGuard:
    """Stops a run whose loss stays above a limit; None sets none."""

    def __init__(self, limit: LossLimit | None) -> None:
        self._limit = limit
        self._num_above = 0

    def check(self, loss: float, step: int) -> None:
        """Counts the steps in a row whose loss is above the limit.

        Raises:
            TrainingError: there have been as many as the limit allows.
        """
        if self._limit is None:
            return
        self._num_above = self._num_above + 1 if loss > self._limit.above else 0
        if self._num_above >= self._limit.patience:
            raise TrainingError(
                f"The training loss was above train.loss_limit.above = {self._limit.above:g} for {self._num_above} "
                f"steps in a row; at step {step} it is {loss:.4f}.",
                fix=_REMEDY,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


class MemoryGuard:
    """Runs micro-batches and splits them when memory runs out; later steps start at the size that fitted.

    Loss and gradients are sums, so a split changes neither. When memory runs out in the middle of backward some
    weights already have their gradient, so the step's gradients are thrown away and its micro-batches start again.
    `max_positions` is the largest size that is tried, in positions (rows times width); 0 is no limit.

    Over several ranks a step is broken off by all or by none, and nobody can break off a reduction that others are
    waiting in. So a step with a micro-batch larger than any before (`fitted_positions`, the same on all ranks) is taken
    carefully: all micro-batches without a reduction, then a word of all on whether they fitted, then the reduction.
    Other steps reduce while the backward runs; there, and where a micro-batch needs the other ranks
    (`Strategy.splits_alone` is false), memory that runs out on one ends the run. `at` is told what begins. On one
    device `relieve` is asked where nothing is left to split: it lets layers keep less and says so, or returns "".
    """

    def __init__(
        self,
        strategy: Strategy,
        notify: Callable[[str], None],
        *,
        relieve: Callable[[], str] = lambda: "",
        at: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.max_positions = 0
        self.fitted_positions = 0
        self._strategy = strategy
        self._notify = notify
        self._relieve = relieve
        self._at = at

    def is_unproven(self, batches: Sequence[Batch]) -> bool:
        """Whether a step on these micro-batches must be taken carefully; it is, once one rank says so."""
        if self._strategy.world_size == 1 or not self._strategy.splits_alone:
            return False
        return _largest(self._fitting(batches)) > self.fitted_positions

    def forward_backward(self, batches: Sequence[Batch], divisor: float, *, careful: bool = False) -> list[Result]:
        """Returns the results of all micro-batches of a step, with the gradients added up, over ranks too.

        Raises:
            TrainingError: memory runs out with single documents, or over several ranks where it must not.
        """
        while True:
            fitting = self._fitting(batches)
            results = self._try(fitting, divisor, reduces=not careful)
            if careful:
                results = self._agreed(results, fitting)
            if results is not None:
                return results
            self._strategy.discard_gradients()
            if not careful:
                self._lower(fitting, alone=self._strategy.world_size == 1)

    def _agreed(self, results: list[Result] | None, fitting: Sequence[Batch]) -> list[Result] | None:
        """Returns the results with gradients reduced if all ranks have some, or None with the limit lowered on all."""
        self._at("asking all ranks whether memory sufficed")
        mine = (_largest(fitting), None, "") if results is not None else (0, *_lowered(fitting))
        said = self._strategy.gather_over_ranks(mine)
        if results is not None and not any(sentence for _, _, sentence in said):
            self._strategy.reduce_gradients()
            self.fitted_positions = max(self.fitted_positions, *(largest for largest, _, _ in said))
            return results
        for rank, (_, limit, sentence) in enumerate(said):
            if sentence and limit is None:
                raise TrainingError(f"{sentence} It is rank {rank} of {len(said)}.", fix=_SINGLE_REMEDY)
        rank = next(rank for rank, (_, _, sentence) in enumerate(said) if sentence)
        self.max_positions = min(limit for _, limit, _ in said if limit is not None)
        self._notify(_split_notice(f"on rank {rank} {said[rank][2]}", self.max_positions))
        return None

    def evaluate(self, batch: Batch) -> list[Result]:
        """Returns the results of `batch`, in parts when it does not fit."""
        while True:
            fitting = self._fitting([batch])
            self._at("evaluating")
            try:
                return [self._strategy.evaluate(part) for part in fitting]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._strategy.discard_gradients()
            self._lower(fitting, alone=self._strategy.splits_alone)

    def _try(self, batches: Sequence[Batch], divisor: float, *, reduces: bool) -> list[Result] | None:
        results: list[Result] = []
        try:
            for number, batch in enumerate(batches, 1):
                self._at(f"forward and backward of micro-batch {number} of {len(batches)}")
                is_last = reduces and number == len(batches)
                results.append(self._strategy.forward_backward(batch, divisor=divisor, is_last=is_last))
            return results
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler: the error's traceback would keep every tensor of the failed attempt alive.
        gc.collect()
        return None

    def _fitting(self, batches: Sequence[Batch]) -> list[Batch]:
        """Splits batches above `max_positions` as far as they can be split."""
        if not self.max_positions or not self._strategy.splits_alone:
            return list(batches)
        fitting: list[Batch] = []
        for batch in batches:
            is_small = batch.input_ids.numel() <= self.max_positions
            fitting += [batch] if is_small or not batch.can_split else self._fitting(batch.split())
        return fitting

    def _lower(self, batches: Sequence[Batch], *, alone: bool) -> None:
        """Lowers `max_positions` so that the largest of `batches` will be split, where no rank waits (`alone`)."""
        if not alone:
            raise TrainingError(
                f"Memory is exhausted on rank {self._strategy.rank} of {self._strategy.world_size}.",
                fix="Lower engine.micro_batch_size, or set engine.recompute: input; --resume goes on.",
            )
        limit, sentence = _lowered(batches)
        if limit is None:
            if self._strategy.world_size == 1 and (relieved := self._relieve()):
                self._notify(relieved)
                return
            raise TrainingError(sentence, fix=_SINGLE_REMEDY)
        self.max_positions = limit
        self._notify(_split_notice(sentence, limit))


def _largest(batches: Sequence[Batch]) -> int:
    """Positions of the largest micro-batch."""
    return max(batch.input_ids.numel() for batch in batches)


def _lowered(batches: Sequence[Batch]) -> tuple[int | None, str]:
    """Returns the size to which the largest of `batches` that can be split is split, and what did not fit.

    None for the size where each holds a single document.
    """
    splittable = [batch for batch in batches if batch.can_split]
    if not splittable:
        width = max(batch.input_ids.shape[1] for batch in batches)
        return None, f"Memory is exhausted with a single document in a row of {width} tokens."
    largest = max(splittable, key=lambda batch: batch.input_ids.numel())
    rows, width = largest.input_ids.shape
    return max(
        half.input_ids.numel() for half in largest.split()
    ), f"with a micro-batch of {rows} rows of {width} tokens"


def _split_notice(what: str, max_positions: int) -> str:
    return (
        f"Memory ran out {what}, so it is split: at most {max_positions:,} tokens at once from here on. Loss and "
        "gradients are unchanged. A lower engine.micro_batch_size avoids the failed attempt."
    )
