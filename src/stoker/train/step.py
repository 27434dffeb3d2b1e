"""One optimiser step: micro-batches, one division by the step's trained tokens, clipping, stepping."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stoker.distributed.strategy import Result, StepResult, Strategy
from stoker.train.batches import Batch
from stoker.train.culprits import name_culprits
from stoker.train.guard import MemoryGuard, gradient_error, loss_error

# A loss scale that starts at 65,536 has fallen below 2**-14 after this many halvings: no scale will mend that step.
_MAX_ATTEMPTS = 30


@dataclass(frozen=True)
class StepOutcome:
    """What one step did, over all ranks; `loss` and `metrics` are means over its trained tokens."""

    loss: float
    gradient_norm: float
    num_tokens: int
    num_trained_tokens: int
    num_positions: int
    metrics: dict[str, float]


def take_step(
    strategy: Strategy,
    batches: Sequence[Batch],
    *,
    number: int,
    learning_rate: float,
    max_gradient_norm: float | None,
    guard: MemoryGuard,
    notify: Callable[[str], None],
    at: Callable[[str], None] = lambda phase: None,
    rows: Callable[[], Sequence[Sequence[int]]] = tuple,
) -> StepOutcome:
    """Takes the step `number` (from 1) on `batches`, and tells `at` each phase that it begins.

    `rows` returns the examples of each micro-batch, for messages.

    When fp16's scaled gradients overflow, the same step is tried again at the lower scale, so that every step is taken
    once on its own rows at its own rate.

    Raises:
        TrainingError: the loss or the gradient is not finite, or memory is exhausted; weights are as before the step.
    """
    at("counting tokens over all ranks")
    tokens, trained, positions, unproven = _counts(strategy, batches, guard.is_unproven(batches))
    divisor = max(trained, 1)
    for _ in range(_MAX_ATTEMPTS):
        results = guard.forward_backward(batches, divisor, careful=unproven > 0)
        at("adding up the loss of all ranks")
        loss, metrics = _means(strategy, results, divisor)
        if not math.isfinite(loss):
            raise loss_error(loss, number, name_culprits(strategy, results, rows))
        at("optimiser step")
        result = strategy.step(learning_rate, max_gradient_norm=max_gradient_norm)
        if result.notice:
            notify(result.notice)
        if not result.skipped:
            return StepOutcome(loss, result.gradient_norm, tokens, trained, positions, metrics)
        _refuse_or_notify(result, number, notify)
    raise gradient_error(result.gradient_norm, number)


def _refuse_or_notify(result: StepResult, number: int, notify: Callable[[str], None]) -> None:
    if result.loss_scale is None:
        raise gradient_error(result.gradient_norm, number)
    notify(f"fp16 gradients of step {number} overflowed; trying it again with loss scale {result.loss_scale:g}.")


def _counts(strategy: Strategy, batches: Sequence[Batch], is_unproven: bool) -> tuple[int, int, int, int]:
    counts = [
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_trained_tokens for batch in batches),
        sum(batch.input_ids.numel() for batch in batches),
        is_unproven,
    ]
    tokens, trained, positions, unproven = map(int, strategy.sum_over_ranks(counts))
    return tokens, trained, positions, unproven


def _means(strategy: Strategy, results: Sequence[Result], divisor: float) -> tuple[float, dict[str, float]]:
    """Returns the step's loss and metrics; waits for the device once."""
    names = sorted(results[0].metrics)
    rows = [torch.stack([result.loss_sum, *(result.metrics[name] for name in names)]) for result in results]
    sums = torch.stack(rows).cpu().double().sum(0).tolist()
    loss, *metrics = [value / divisor for value in strategy.sum_over_ranks(sums)]
    return loss, dict(zip(names, metrics, strict=True))
