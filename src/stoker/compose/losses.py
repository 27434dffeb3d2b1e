"""The loss before and after training, on the same rows of each split."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console

from stoker.compose.trainer import Engine
from stoker.distributed.strategy import Strategy
from stoker.train.evaluate import evaluate

if TYPE_CHECKING:
    from stoker.data.batch import Batch

_SECONDS_A_SPLIT = 20.0


@dataclass(frozen=True)
class Measured:
    """Mean loss of the first `num_batches` micro-batches of a split, in nats; `whole`: these are all of its rows."""

    loss: float
    num_batches: int
    num_trained_tokens: int
    whole: bool
    num_ranks: int = 1


def measure(engine: Engine, console: Console) -> dict[str, Measured]:
    """Returns the loss on each split, on as many of its rows as some seconds allow."""
    return {split: _timed(engine, split, console) for split in _splits(engine)}


def measure_again(engine: Engine, before: dict[str, Measured], console: Console) -> dict[str, float]:
    """Returns the loss on the same rows as `before`."""
    losses = {}
    for split, measured in before.items():
        with console.status(f"loss after training: {split}"):
            # As many rows, over however many ranks (or groups of them) there are now.
            count = -(-measured.num_batches * measured.num_ranks // engine.num_groups)
            losses[split] = evaluate(engine.strategy, islice(_batches(engine, split), count)).loss
    return losses


def _timed(engine: Engine, split: str, console: Console) -> Measured:
    batches = _Timed(_batches(engine, split), engine.strategy)
    with console.status(f"loss before training: {split}"):
        evaluation = evaluate(engine.strategy, batches)
    counts = (batches.count, evaluation.num_trained_tokens, batches.is_whole, engine.num_groups)
    return Measured(evaluation.loss, *counts)


def _splits(engine: Engine) -> list[str]:
    return ["train"] if engine.validation is None else ["train", "validation"]


def _batches(engine: Engine, split: str) -> "Iterable[Batch]":
    return engine.train.all() if split == "train" else engine.validation_batches()


class _Timed:
    """Batches until the time is up on a rank, at least one of them with a trained token; equally many on all ranks."""

    def __init__(self, batches: "Iterable[Batch]", strategy: Strategy) -> None:
        self._batches, self._strategy = batches, strategy
        self.count = 0
        self.is_whole = True

    def __iter__(self) -> "Iterator[Batch]":
        started, trained = time.monotonic(), 0
        for batch in self._batches:
            late = time.monotonic() - started > _SECONDS_A_SPLIT
            if all(self._strategy.sum_over_ranks([trained, late])):
                self.is_whole = False
                return
            self.count += 1
            trained += batch.num_trained_tokens
            yield batch
