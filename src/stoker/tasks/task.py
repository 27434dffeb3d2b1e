"""What a task is: a module from a batch to a summed loss. It is what a strategy wraps and calls."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(Protocol):
    """What a task reads of a micro-batch (B rows of T positions)."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids `[B, T]`, int64."""

    @property
    def targets(self) -> Tensor:
        """The token that each position must predict, or -100: `[B, T]`, int64."""

    @property
    def document_lengths(self) -> tuple[tuple[int, ...], ...] | None:
        """Lengths of each row's documents, or None when every row is one document."""

    @property
    def num_trained_tokens(self) -> int:
        """How many targets are not -100."""

    @property
    def num_tokens(self) -> int:
        """How many tokens are not padding, which is on the right."""

    @property
    def row_tokens(self) -> tuple[int, ...] | None:
        """The same by row; None if rows hold equally many."""


class TaskResult(NamedTuple):
    """The loss of one micro-batch as a sum, so that it can be divided by the count of the whole step.

    A tuple, because wrappers such as DDP and FSDP look for tensors in the outputs of what they wrap.
    """

    loss_sum: Tensor
    """Sum over trained tokens, fp32 scalar, in nats."""
    num_trained_tokens: int
    """Tokens in the sum."""
    metrics: Mapping[str, Tensor]
    """Further sums over trained tokens, detached scalars; the trainer divides them as it divides the loss."""


class Task(Protocol):
    """A module whose `forward` returns the summed loss of a micro-batch."""

    def __call__(self, batch: Batch) -> TaskResult:
        """Returns the loss of `batch`, with a gradient when gradients are enabled."""
