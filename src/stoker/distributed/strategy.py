"""How a step runs on one or many devices: what every strategy offers to the trainer.

The order of calls is: `prepare` once; then for each optimiser step `forward_backward` for each micro-batch, with
`is_last` on the last, and `step`. Written so that DDP, FSDP2 and DeepSpeed fit as well as a single device does:

- the strategy owns the optimiser and calls it, because DeepSpeed's engine does its own clipping, scaling and stepping;
- `is_last` is where DDP and FSDP2 reduce gradients and where DeepSpeed sets its accumulation boundary;
- gradients are of a loss divided by `divisor`, the trained tokens of the whole step over all ranks, so a strategy whose
  reduction averages over ranks multiplies by `world_size` first;
- state is flat: named tensors and plain values, whatever the strategy keeps inside.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stoker.distributed.rehearsal import Rehearsal

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""From the trained parameters, by name, to their optimiser."""


class Batch(Protocol):
    """A micro-batch, which the strategy moves to its device and hands to the task."""

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with its tensors on `device`."""

    def shortened(self) -> "Batch":
        """Returns a small batch that needs the same kernels, for a rehearsal."""


class Result(Protocol):
    """What a task returns."""

    @property
    def loss_sum(self) -> Tensor:
        """Sum over trained tokens, fp32 scalar."""

    @property
    def num_trained_tokens(self) -> int:
        """Tokens in the sum."""

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Further sums, detached."""


@dataclass(frozen=True)
class StepResult:
    """One optimiser step: the norm of its gradient before clipping, over all ranks.

    `skipped` says that the norm was not finite, so the weights and the optimiser were left as they were. With a loss
    scale (fp16) that is part of the work: the scale has been lowered to `loss_scale`, and the step can be tried again.
    `notice`: a sentence about how the step was run that the user should know.
    """

    gradient_norm: float
    skipped: bool = False
    loss_scale: float | None = None
    notice: str = ""


@dataclass(frozen=True)
class StrategyState:
    """What a strategy must have back to go on: trained weights and optimiser tensors by name, and plain values."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    values: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Rows(Protocol):
    """Tensors by name of which a rank may read the rows that it holds alone."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop - 1`."""
        ...


class Strategy(Protocol):
    """Runs micro-batches and optimiser steps of a task on this rank's device, together with the other ranks."""

    @property
    def rank(self) -> int:
        """This process's number, from 0; the first one prints and writes."""

    @property
    def world_size(self) -> int:
        """How many processes take each step together."""

    @property
    def part(self) -> int:
        """Which part of each weight this rank steps, from 0; ranks with the same part must step it alike."""

    @property
    def device(self) -> torch.device:
        """The device that batches go to."""

    @property
    def splits_alone(self) -> bool:
        """Whether this rank may run its micro-batches without the others: as many as it likes, but for the last."""

    @property
    def rehearsal(self) -> Rehearsal | None:
        """What the rehearsal of the first micro-batch took; None where there was none."""

    def prepare(self, task: nn.Module, make_optimizer: MakeOptimizer | None = None) -> None:
        """Takes over `task`: places and wraps it, and makes the optimiser of its trained parameters.

        Without `make_optimizer` it can only evaluate.
        """

    def forward_backward(self, batch: Batch, *, divisor: float, is_last: bool) -> Result:
        """Adds the gradient of `loss_sum / divisor` and returns the task's result, detached and undivided."""

    def reduce_gradients(self) -> None:
        """Sums gradients over ranks after micro-batches none of which was the last; every rank must call it.

        Only where it `splits_alone`.
        """

    def discard_gradients(self) -> None:
        """Forgets the gradients added since the last step and frees cached memory (after running out of it)."""

    def step(self, learning_rate: float, *, max_gradient_norm: float | None) -> StepResult:
        """Clips the gradient, steps the optimiser at `learning_rate` and clears the gradient."""

    def evaluate(self, batch: Batch) -> Result:
        """Returns the task's result in evaluation mode, without gradients."""

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Returns the element-wise sum over ranks; every rank must call it."""

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, in their order; every rank must call it."""

    def let_go(self) -> None:
        """Frees weights that an evaluation left gathered; each rank has its parts alone then."""

    def gathered(self, *, trained_only: bool) -> AbstractContextManager[None]:
        """Within it the task on the first rank holds whole parameters, to be saved; every rank must enter it."""

    def state(self) -> StrategyState:
        """Returns the state, whole on the first rank; tensors may share memory with the live ones.

        Every rank must call it.
        """

    def shared_state(self) -> StrategyState:
        """Returns the state for every rank to write its part of: DTensors of what ranks share, other tensors alike on
        every rank that has them. Every rank must call it.
        """

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes back the weights of a state alone; raises CheckpointError when they are not this model's."""

    def load_state(self, state: StrategyState) -> None:
        """Takes back a state, also one that another number of ranks wrote.

        Raises:
            CheckpointError: its names or shapes are not those of this model and optimiser.
        """

    def peak_memory_bytes(self) -> int:
        """Returns the most memory that was in use: the device's, or the process's on a CPU."""
