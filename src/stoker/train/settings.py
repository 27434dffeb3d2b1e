"""What the trainer is told: how long, how fast, when to evaluate, to save and to stop."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Every:
    """Every so many steps, or every so many epochs (fractions allowed). With neither it never comes due."""

    steps: int | None = None
    epochs: float | None = None

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether it falls on the end of `step` (from 1)."""
        if step < 1:
            return False
        if self.steps is not None and step % self.steps == 0:
            return True
        if self.epochs is None:
            return False
        # Counted in whole periods, so that a fraction of an epoch falls on the first step at or after it. The
        # tolerance keeps 3 * (1 / 3 of 10 steps) from being a hair below 10.
        period = self.epochs * steps_per_epoch
        return math.floor(step / period + 1e-9) > math.floor((step - 1) / period + 1e-9)


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations in a row that do not lower the loss by more than `min_improvement`."""

    patience: int
    min_improvement: float = 0.0


@dataclass(frozen=True)
class LossLimit:
    """Stop when the loss of `patience` steps in a row is above `above`."""

    above: float
    patience: int = 3


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go, when, and how many stay: the last `keep_last`, and the best unless `keep_best` is off.

    `background`: whether steps go on while one is written; None: where host memory has room for a copy of the state.
    """

    folder: Path
    every: Every = Every()
    keep_last: int = 3
    keep_best: bool = True
    background: bool | None = None


@dataclass(frozen=True)
class Settings:
    """`schedule` maps a step's index (from 0) to the share of `learning_rate` that it uses.

    `warm_up_reason`: why a first step may take long, said where it does.
    """

    total_steps: int
    learning_rate: float
    schedule: Callable[[int], float]
    max_gradient_norm: float | None = 1.0
    evaluate: Every = Every()
    early_stopping: EarlyStopping | None = None
    loss_limit: LossLimit | None = None
    log_every_steps: int = 1
    warm_up_reason: str = ""
