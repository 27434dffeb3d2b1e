"""The loss on rows that are not trained on."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stoker.distributed.strategy import Strategy
from stoker.errors import DataError
from stoker.train.batches import Batch
from stoker.train.guard import MemoryGuard


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over `num_trained_tokens`, over all ranks."""

    loss: float
    num_trained_tokens: int
    seconds: float


def evaluate(strategy: Strategy, batches: Iterable[Batch]) -> Evaluation:
    """Returns the mean loss over every trained token of `batches`, without gradients and without dropout.

    Raises:
        DataError: no token of them is trained, so there is no loss.
    """
    result = evaluate_unless(lambda: False, MemoryGuard(strategy, lambda message: None), strategy, batches)
    if result is None:
        raise RuntimeError("an evaluation that nothing interrupts must end")
    return result


def evaluate_unless(
    interrupted: Callable[[], bool], guard: MemoryGuard, strategy: Strategy, batches: Iterable[Batch]
) -> Evaluation | None:
    """Evaluates as `evaluate` does, or returns None as soon as `interrupted` says so between two batches."""
    started = time.perf_counter()
    loss_sum, trained = 0.0, 0
    for batch in batches:
        if interrupted():
            return None
        results = guard.evaluate(batch)
        loss_sum += sum(float(result.loss_sum) for result in results)
        trained += sum(result.num_trained_tokens for result in results)
    loss_sum, total = strategy.sum_over_ranks([loss_sum, trained])
    if not total:
        raise DataError(
            "The validation rows hold no trained token, so there is no validation loss.",
            fix="Look at them with `stoker inspect`; check data.train_on and data.sequence_length.",
        )
    return Evaluation(loss_sum / total, int(total), time.perf_counter() - started)
