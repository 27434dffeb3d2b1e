"""What the trainer needs of batches: the data room's `Batch` and `StepLoader` have this shape."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class Batch(Protocol):
    """A micro-batch of B rows."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids `[B, T]`."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""

    @property
    def num_trained_tokens(self) -> int:
        """Targets that are not -100."""

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with its tensors on `device`."""

    def shortened(self) -> "Batch":
        """Returns a small batch that needs the same kernels, for a rehearsal."""

    @property
    def can_split(self) -> bool:
        """Whether it holds more than one row, or more than one document."""

    def split(self) -> "Sequence[Batch]":
        """Returns two smaller batches with the same targets between them; asked only when `can_split`."""


class StepSource(Protocol):
    """The micro-batches of every step: a pure function of the step's index, so that a resumed run repeats them."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the rows."""

    def step(self, index: int) -> Sequence[Batch]:
        """Returns this rank's micro-batches of the step with this index (from 0)."""


@runtime_checkable
class Streamed(Protocol):
    """A step source that reads a stream: where it stands must be kept beside the step's number."""

    def position(self) -> Mapping[str, Any]:
        """Returns where the next step stands, as JSON values."""

    def seek(self, index: int, position: Mapping[str, Any]) -> None:
        """Goes to where `position` was taken, before the step with this index."""


@runtime_checkable
class Numbered(Protocol):
    """A step source whose rows have numbers, for messages about them."""

    def examples(self, index: int) -> Sequence[Sequence[int]]:
        """Returns the numbers of the examples in each of this rank's micro-batches of the step with this index."""


def rows_of(source: StepSource, index: int) -> Sequence[Sequence[int]]:
    """Returns the examples in each of this rank's micro-batches of a step; nothing where they have no numbers."""
    return source.examples(index) if isinstance(source, Numbered) else ()


Batches = Callable[[], Iterable[Batch]]
"""Called for each evaluation; returns the batches to evaluate, in order."""
