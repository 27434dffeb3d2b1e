"""What the trainer itself must remember across a resume; weights, optimiser and random numbers are kept elsewhere."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.train.settings import EarlyStopping


@dataclass
class TrainState:
    """Progress of a run after `step` steps.

    `best_loss` and `best_step` are of the lowest validation loss; `reference_loss` is the one that early stopping
    measures improvement from. `evaluated_step` is the last step whose evaluation is complete. `max_positions` is
    the size of the largest micro-batch that fits, once memory has run out (0: it never did); `fitted_positions` that of
    the largest that all of several ranks have seen fit.
    """

    step: int = 0
    evaluated_step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    reference_loss: float | None = None
    evaluations_without_improvement: int = 0
    max_positions: int = 0
    fitted_positions: int = 0
    num_trained_tokens: int = 0

    def to_values(self) -> dict[str, Any]:
        """Returns the state as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "TrainState":
        """Returns the state that `to_values` described."""
        return cls(**values)

    def note_evaluation(self, loss: float, min_improvement: float) -> bool:
        """Takes in a validation loss after the current step; returns whether it is the lowest so far."""
        self.evaluated_step = self.step
        is_best = loss < (math.inf if self.best_loss is None else self.best_loss)
        if is_best:
            self.best_loss, self.best_step = loss, self.step
        if self.reference_loss is None or loss < self.reference_loss - min_improvement:
            self.reference_loss, self.evaluations_without_improvement = loss, 0
        else:
            self.evaluations_without_improvement += 1
        return is_best

    def is_out_of_patience(self, early_stopping: EarlyStopping | None) -> bool:
        """Whether early stopping ends the run here."""
        return early_stopping is not None and self.evaluations_without_improvement >= early_stopping.patience
