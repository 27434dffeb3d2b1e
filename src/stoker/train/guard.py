"""Keeps a run from going on with numbers that mean nothing, and lets it go on when memory runs out."""

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

# How allocators other than CUDA's say it: torch raises a plain RuntimeError for these.
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def check_finite(loss: float, step: int, *, what: str = "training loss") -> None:
    """Raises TrainingError when `loss` is infinite or not a number."""
    if not math.isfinite(loss):
        raise TrainingError(f"The {what} of step {step} is {loss}.", fix=_REMEDY)


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
    `max_positions` is the largest size that is tried, in positions (rows times width); 0 is no limit. Over several
    ranks nothing is split, because all must run equally many micro-batches: memory that runs out on one ends the run.
    """

    def __init__(self, strategy: Strategy, notify: Callable[[str], None]) -> None:
        self.max_positions = 0
        self._strategy = strategy
        self._notify = notify

    def forward_backward(self, batches: Sequence[Batch], divisor: float) -> list[Result]:
        """Returns the results of all micro-batches of a step, with the gradients added up.

        Raises:
            TrainingError: memory runs out with single documents.
        """
        while True:
            fitting = self._fitting(batches)
            results = self._try(fitting, divisor)
            if results is not None:
                return results
            self._strategy.discard_gradients()
            self._lower(fitting)

    def evaluate(self, batch: Batch) -> list[Result]:
        """Returns the results of `batch`, in parts when it does not fit."""
        while True:
            fitting = self._fitting([batch])
            try:
                return [self._strategy.evaluate(part) for part in fitting]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._strategy.discard_gradients()
            self._lower(fitting)

    def _try(self, batches: Sequence[Batch], divisor: float) -> list[Result] | None:
        last = len(batches) - 1
        try:
            return [
                self._strategy.forward_backward(batch, divisor=divisor, is_last=index == last)
                for index, batch in enumerate(batches)
            ]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler: the error's traceback would keep every tensor of the failed attempt alive.
        return None

    def _fitting(self, batches: Sequence[Batch]) -> list[Batch]:
        """Splits batches above `max_positions` as far as they can be split."""
        if not self.max_positions or self._strategy.world_size > 1:
            return list(batches)
        fitting: list[Batch] = []
        for batch in batches:
            is_small = batch.input_ids.numel() <= self.max_positions
            fitting += [batch] if is_small or not batch.can_split else self._fitting(batch.split())
        return fitting

    def _lower(self, batches: Sequence[Batch]) -> None:
        """Lowers `max_positions` so that the largest of `batches` that can be split will be."""
        if self._strategy.world_size > 1:
            raise TrainingError(
                f"Memory is exhausted on rank {self._strategy.rank} of {self._strategy.world_size}.",
                fix="Lower engine.micro_batch_size, or set engine.recompute: input; --resume goes on.",
            )
        splittable = [batch for batch in batches if batch.can_split]
        if not splittable:
            width = max(batch.input_ids.shape[1] for batch in batches)
            raise TrainingError(
                f"Memory is exhausted with a single document in a row of {width} tokens.",
                fix="Set engine.recompute: input, lower data.sequence_length, or train an adapter of lower rank.",
            )
        largest = max(splittable, key=lambda batch: batch.input_ids.numel())
        self.max_positions = max(half.input_ids.numel() for half in largest.split())
        rows, width = largest.input_ids.shape
        self._notify(
            f"Memory ran out with a micro-batch of {rows} rows of {width} tokens, so it is split: at most "
            f"{self.max_positions:,} tokens at once from here on. Loss and gradients are unchanged. A lower "
            "engine.micro_batch_size avoids the failed attempt."
        )
