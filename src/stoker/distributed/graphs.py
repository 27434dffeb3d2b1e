"""CUDA graphs of micro-batches: one launch in place of some thousands, where launching is what a step waits for.

A graph replays fixed kernels on fixed memory. So a micro-batch is copied into buffers of its shape, its length rounded
up to a bucket (what is added is padding, which trains nothing and which causal layers do not look at), and the loss's
factor is a tensor. Of packed rows the documents' boundaries are copied, too, into a tensor with room for more of them
(`graph_shapes`). The first micro-batches of a shape run launch by launch, which compiles kernels; then the shape is
captured. Gradients add up in place, hence they are cleared in place too. Where the optimiser takes its gradient as one
tensor, a graph ends by writing it: its memory is then part of the graphs' pool, whose activations have ended by then.

Not everything can be captured: dropout draws its seeds anew. That runs as it always does.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from stoker import collector, transfer
from stoker.distributed.graph_shapes import BUCKET_TOKENS, GraphShape, closest, ends_of, is_close, shape_of

WARM_UP = 2
"""Micro-batches of a shape that run launch by launch before it is captured; packed rows are of one, whatever their
documents, since those do not choose a kernel."""

MAX_GRAPHS = 16
"""Shapes of rows that are captured, with room for what those hold; further ones run as they always do. All graphs share
one pool of memory."""

MAX_CLOSER = 24
"""Graphs beside those with less room, each for what comes a second time."""


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

    def capturing(self, num_trained: int, ends: Tensor | None = None, longest: int = 0) -> AbstractContextManager[None]:
        """Within it, no size of the task's work depends on the values in a batch.

        `num_trained`: how many positions run through the head, no fewer than a batch trains. `ends` [n + 1] int32:
        where documents of packed rows begin, and where the last one ends; they are read there, and none has more than
        `longest` positions. None: rows are not packed.
        """

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
    ends: Tensor | None
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
        self._captured: dict[GraphShape, _Captured] = {}
        self._seen: dict[GraphShape, int] = {}
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
        if batch.document_lengths is None:
            batch = _in_bucket(batch)
        wanted = _shape(batch)
        found = closest(wanted, self._captured)
        if found is None and not self._is_full and self._comes_again(_rows(wanted), times=WARM_UP):
            found = self._captured_as(wanted.roomy(), batch)
        elif found is not None and self._has_too_much_room(found, wanted) and self._comes_again(wanted.rounded()):
            found = self._captured_as(wanted.rounded(), batch) or found
        if found is not None:
            return self._replay(found, batch)
        if batch.document_lengths is None or self._is_full:
            return self._eager(batch)
        # With the kernels, and in the memory, that its graph is going to take.
        shape = wanted.roomy()
        with self._task.capturing(shape.trained, self._boundaries(batch, shape), shape.longest):
            return self._eager(batch)

    def capture(self, batches: Iterable[Batch]) -> int:
        """Captures at once the graphs that batches would get if they came again, and returns how many those are.

        None are of rows that have not run launch by launch yet.
        """
        before = len(self._captured)
        for given in batches:
            batch = _in_bucket(given) if given.document_lengths is None else given
            wanted = _shape(batch)
            found = closest(wanted, self._captured)
            is_warm = self._seen.get(_rows(wanted), 0) >= WARM_UP
            if found is None and is_warm and not self._is_full:
                self._captured_as(wanted.roomy(), batch)
            elif found is not None and self._has_too_much_room(found, wanted):
                self._captured_as(wanted.rounded(), batch)
        return len(self._captured) - before

    @property
    def _is_full(self) -> bool:
        """Whether no more rows are captured."""
        num_rows = len(self._captured) - self._num_closer
        return bool(self.refused) or num_rows >= MAX_GRAPHS or len(self._captured) >= MAX_GRAPHS + MAX_CLOSER

    @property
    def _num_closer(self) -> int:
        """Graphs with less room than the first of their rows."""
        return len(self._captured) - len({_rows(shape) for shape in self._captured})

    def _has_too_much_room(self, found: GraphShape, wanted: GraphShape) -> bool:
        """Whether a graph with less room is worth while, and may be there."""
        return not (self.refused or self._num_closer >= MAX_CLOSER or is_close(found, wanted))

    def _comes_again(self, shape: GraphShape, *, times: int = 1) -> bool:
        """Whether so many micro-batches of the shape came before this one, which is counted."""
        self._seen[shape] = self._seen.get(shape, 0) + 1
        return self._seen[shape] > times

    def _captured_as(self, shape: GraphShape, batch: Batch) -> GraphShape | None:
        """The shape, with its graph; None if it cannot be captured, and that was not asked for."""
        try:
            self._captured[shape] = self._capture(batch, shape)
        except torch.OutOfMemoryError:
            raise  # a smaller micro-batch is what helps
        except RuntimeError as error:
            if not self._falls_back:
                raise
            self._refuse(error)
            return None
        return shape

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

    def _boundaries(self, batch: Batch, shape: GraphShape) -> Tensor:
        """Where the batch's documents begin, with room for as many as the shape has, on the device: int32."""
        return transfer.int32s(ends_of(batch.document_lengths, shape.documents), self._device)

    def _capture(self, batch: Batch, shape: GraphShape) -> _Captured:
        held = replace(batch, input_ids=batch.input_ids.clone(), targets=batch.targets.clone())
        ends = self._boundaries(batch, shape) if shape.documents else None
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what eager steps left cached, the pool of graphs cannot use
        graph = torch.cuda.CUDAGraph()
        capturing = self._task.capturing(shape.trained, ends, shape.longest)
        # A graph of before that the collector found now would end the capture of this one.
        with collector.at_rest(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream), capturing:
            result = self._forward_backward(held)
            if self._gather is not None:
                self._gradient = self._gather(self._gradient)
        loss_sum, metrics = result.loss_sum.detach(), dict(result.metrics)
        return _Captured(graph, held.input_ids, held.targets, ends, loss_sum, metrics, self._gradient)

    def _replay(self, shape: GraphShape, batch: Batch) -> Ran:
        captured = self._captured[shape]
        captured.input_ids.copy_(batch.input_ids)
        captured.targets.copy_(batch.targets)
        if captured.ends is not None:
            captured.ends.copy_(self._boundaries(batch, shape))
        captured.graph.replay()
        metrics = {name: value.clone() for name, value in captured.metrics.items()}
        result = Replayed(captured.loss_sum.clone(), batch.num_trained_tokens, metrics)
        return Ran(result, captured.gradient, is_reused=True)


def _shape(batch: Batch) -> GraphShape:
    rows, length = batch.input_ids.shape
    return shape_of(rows, length, batch.num_trained_tokens, batch.document_lengths)


def _rows(shape: GraphShape) -> GraphShape:
    """The shape without what its rows hold: nothing trained, and one document of one position if they are packed."""
    return shape._replace(trained=0, documents=min(1, shape.documents), longest=min(1, shape.longest))


def _in_bucket(batch: Batch) -> Batch:
    """The batch, padded to a length that graphs are made of."""
    return batch.padded_to(-(-batch.input_ids.shape[1] // BUCKET_TOKENS) * BUCKET_TOKENS)
