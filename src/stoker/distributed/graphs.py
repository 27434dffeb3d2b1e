"""CUDA graphs of micro-batches: one launch in place of some thousands, where launching is what a step waits for.

A graph replays fixed kernels on fixed memory. So a micro-batch is copied into buffers of its shape, its length rounded
up to a bucket (what is added is padding, which trains nothing and which causal layers do not look at), and the loss's
factor is a tensor. The first micro-batches of a shape run as they always do, which compiles kernels; then the shape is
captured. Gradients add up in place, hence they are cleared in place too. Where the optimiser takes its gradient as one
tensor, a graph ends by writing it: its memory is then part of the graphs' pool, whose activations have ended by then.

Not everything can be captured: packed rows differ in their documents, dropout in its seeds. Those run as they always
do.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

BUCKET_TOKENS = 64
"""Lengths are rounded up to a multiple of this."""

WARM_UP = 2
"""Micro-batches of a shape that run as they always do before it is captured."""

MAX_GRAPHS = 16
"""Shapes that are captured; further ones run as they always do. All graphs share one pool of memory."""


class Batch(Protocol):
    """What a graph reads of a micro-batch, which is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    input_ids: Tensor
    targets: Tensor
    document_lengths: Any
    num_trained_tokens: int

    def padded_to(self, length: int) -> "Batch":
        """Returns the batch with padding on the right."""


class Task(Protocol):
    """A task whose forward can be captured."""

    def capturing(self) -> AbstractContextManager[None]:
        """Within it, no size of the task's work depends on the values in a batch."""

    def __call__(self, batch: Any) -> Any:
        """Returns the task's result."""


class Replayed(NamedTuple):
    """A task's result, from a graph."""

    loss_sum: Tensor
    num_trained_tokens: int
    metrics: Mapping[str, Tensor]


class Ran(NamedTuple):
    """A micro-batch's result, and its gradient if it is one tensor; `is_reused`: the next one overwrites that."""

    result: Any
    gradient: Tensor | None = None
    is_reused: bool = False


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    input_ids: Tensor
    targets: Tensor
    loss_sum: Tensor
    metrics: Mapping[str, Tensor]
    gradient: Tensor | None


class MicroBatchGraphs:
    """Captures and replays forward and backward of `task` on a CUDA device; `autocast` makes the forward's context.

    `gather` takes the gradients from the parameters and returns them as one tensor (in the one given). Without it
    gradients must be cleared in place between steps; once they are thrown away, so must the graphs be (`clear`).
    With `falls_back`, what cannot be captured runs as it always does, and `refused` says why; else it raises.
    """

    def __init__(
        self,
        task: Task,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        gather: Callable[[Tensor | None], Tensor] | None = None,
        falls_back: bool = False,
    ) -> None:
        self._task, self._device, self._autocast = task, device, autocast
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._seen: dict[tuple[int, int], int] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # The capture's stream, which other micro-batches run on too: autograd ties a gradient to the stream that it
        # first arrives on.
        self._stream = torch.cuda.Stream(device)
        self._factor = torch.ones((), device=device)
        self._gather = gather
        self._falls_back = falls_back
        self.refused = ""
        self._gradient: Tensor | None = None  # of the graph that ran last: all of them write to the same

    def run(self, batch: Batch, factor: Tensor) -> Ran:
        """Adds the gradient of `loss_sum * factor`, or hands it out; the batch is on the device."""
        self._factor.copy_(factor)
        if batch.document_lengths is not None:
            return self._eager(batch)
        batch = _in_bucket(batch)
        shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        if shape in self._captured:
            return self._replay(self._captured[shape], batch)
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] <= WARM_UP or len(self._captured) >= MAX_GRAPHS or self.refused:
            return self._eager(batch)
        try:
            self._captured[shape] = self._capture(batch)
        except torch.OutOfMemoryError:
            raise  # a smaller micro-batch is what helps
        except RuntimeError as error:
            if not self._falls_back:
                raise
            self._refuse(error)
            return self._eager(batch)
        return self._replay(self._captured[shape], batch)

    def _refuse(self, error: RuntimeError) -> None:
        """Captures nothing from now on. What was being captured has not run: no gradient was added to."""
        self.refused = str(error).strip().partition("\n")[0] or type(error).__name__
        if self._gather is not None:  # it takes all gradients there are, and there were none before
            self._gather(None)

    def rehearse(self, batch: Batch) -> None:
        """Runs forward and backward as a first micro-batch would, and leaves it at that."""
        self._eager(_in_bucket(batch) if batch.document_lengths is None else batch)

    def clear(self) -> None:
        """Lets go of all graphs and their memory."""
        torch.cuda.synchronize(self._device)
        self._captured.clear()
        self._seen.clear()
        # A pool ends with the last graph that uses it.
        self._pool = torch.cuda.graph_pool_handle()
        self._gradient = None

    @property
    def num_captured(self) -> int:
        """Shapes that are captured."""
        return len(self._captured)

    def _eager(self, batch: Batch) -> Ran:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._forward_backward(batch)
            gradient = None if self._gather is None else self._gather(None)
        current.wait_stream(self._stream)
        if gradient is not None:
            gradient.record_stream(current)
        return Ran(result, gradient)

    def _forward_backward(self, batch: Batch) -> Any:
        with self._autocast():
            result = self._task(batch)
        (result.loss_sum * self._factor).backward()
        return result

    def _capture(self, batch: Batch) -> _Captured:
        held = replace(batch, input_ids=batch.input_ids.clone(), targets=batch.targets.clone())
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what eager steps left cached, the pool of graphs cannot use
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream), self._task.capturing():
            result = self._forward_backward(held)
            if self._gather is not None:
                self._gradient = self._gather(self._gradient)
        loss_sum, metrics = result.loss_sum.detach(), dict(result.metrics)
        return _Captured(graph, held.input_ids, held.targets, loss_sum, metrics, self._gradient)

    @staticmethod
    def _replay(captured: _Captured, batch: Batch) -> Ran:
        captured.input_ids.copy_(batch.input_ids)
        captured.targets.copy_(batch.targets)
        captured.graph.replay()
        metrics = {name: value.clone() for name, value in captured.metrics.items()}
        result = Replayed(captured.loss_sum.clone(), batch.num_trained_tokens, metrics)
        return Ran(result, captured.gradient, is_reused=True)


def _in_bucket(batch: Batch) -> Batch:
    """The batch, padded to a length that graphs are made of."""
    return batch.padded_to(-(-batch.input_ids.shape[1] // BUCKET_TOKENS) * BUCKET_TOKENS)
