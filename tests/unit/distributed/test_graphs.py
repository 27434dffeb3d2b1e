"""Which micro-batches are captured, and what is given to a graph; capturing itself needs a GPU
(tests/kernels/test_graphs.py)."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from stoker.distributed import graphs
from stoker.distributed.graph_shapes import GraphShape
from stoker.distributed.graphs import MicroBatchGraphs, Ran


@dataclass
class Rows:
    input_ids: Tensor = field(default_factory=lambda: torch.zeros(2, 64, dtype=torch.int64))
    targets: Tensor = field(default_factory=lambda: torch.zeros(2, 64, dtype=torch.int64))
    document_lengths: tuple | None = None
    num_trained_tokens: int = 128

    def padded_to(self, length):
        assert length == 64
        return self


class Stream:
    def __init__(self, device):
        pass


@pytest.fixture
def make(monkeypatch):
    """Graphs whose capture raises `error`, with a list of what ran."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)

    def build(error, *, falls_back):
        ran = []

        class Failing(MicroBatchGraphs):
            def _eager(self, batch):
                ran.append("eager")
                return Ran(len(ran))

            def _capture(self, batch, shape):
                ran.append("capture")
                raise error

        def gather(out):
            ran.append("gathered")
            return torch.zeros(1)

        options = {"device": torch.device("cpu"), "autocast": None, "gather": gather, "falls_back": falls_back}
        return Failing(None, **options), ran

    return build


def test_a_failed_capture_is_not_tried_again_and_leaves_no_gradient(make):
    one, ran = make(RuntimeError("operation not permitted when stream is capturing\nmore"), falls_back=True)
    for _ in range(graphs.WARM_UP + 3):
        assert one.run(Rows(), torch.ones(())).result == len(ran)
    assert ran == ["eager"] * graphs.WARM_UP + ["capture", "gathered"] + ["eager"] * 3
    assert one.refused == "operation not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("error", "falls_back"), [(RuntimeError("no"), False), (torch.OutOfMemoryError("none left"), True)]
)
def test_what_was_asked_for_fails_and_memory_that_runs_out_is_the_guards(make, error, falls_back):
    one, _ = make(error, falls_back=falls_back)
    for _ in range(graphs.WARM_UP):
        one.run(Rows(), torch.ones(()))
    with pytest.raises(type(error)):
        one.run(Rows(), torch.ones(()))
    assert not one.refused


class Summing:
    """A task whose loss is told by weights, ids and the boundaries that it reads."""

    def __init__(self):
        self.weights = torch.arange(1.0, 51.0, requires_grad=True)
        self.ends, self.longest, self.read = None, 0, []
        self.reads_lengths, self.trained = False, []

    @contextmanager
    def capturing(self, num_trained, ends=None, longest=0):
        self.trained.append(num_trained)
        self.ends, self.longest = ends, longest
        yield
        self.ends, self.longest = None, 0

    def __call__(self, batch):
        assert (self.ends is None) == (batch.document_lengths is None or self.reads_lengths)
        begins = self.ends[:-1].clone() if self.ends is not None else torch.zeros(1, dtype=torch.int32)
        self.read.append((begins.tolist(), self.longest))
        loss = (self.weights[batch.input_ids] * batch.targets).sum() + self.weights[0] * begins.float().square().sum()
        return graphs.Replayed(loss, batch.num_trained_tokens, {"twice": 2 * loss.detach()})


class Rerun(MicroBatchGraphs):
    """Graphs whose replay runs the task again on what it was captured with, in place of what a GPU recorded."""

    def _eager(self, batch):
        self.ran.append("eager")
        return Ran(self._forward_backward(batch))

    def _capture(self, batch, shape):
        self.ran.append(shape[3:])
        held = replace(batch, input_ids=batch.input_ids.clone(), targets=batch.targets.clone())
        ends = self._boundaries(batch, shape) if shape.documents else None
        task, again = self._task, self._forward_backward
        captured = graphs._Captured(None, held.input_ids, held.targets, ends, torch.zeros(()), {}, None)

        class Graph:
            @staticmethod
            def replay():
                with task.capturing(shape.trained, ends, shape.longest):
                    result = again(held)
                captured.loss_sum, captured.metrics = result.loss_sum.detach(), result.metrics

        captured.graph = Graph
        return captured


@pytest.fixture
def rerun(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    made = Rerun(Summing(), device=torch.device("cpu"), autocast=nullcontext)
    made.ran = []
    return made


def packed(*documents, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(documents), sum(documents[0]))
    ids, targets = (torch.randint(1, 50, shape, generator=generator) for _ in range(2))
    return Rows(ids, targets, documents, targets.numel())


DIFFERENT = [
    packed((40, 88), (128,), seed=1),
    packed((128,), (128,), seed=2),
    packed((60, 60, 8), (1, 127), seed=3),
    packed((100, 28), (64, 64), seed=4),
    packed((28, 100), (64, 60, 4), seed=5),
]


def test_packed_rows_of_any_documents_are_replayed_with_their_own(rerun):
    for batch in DIFFERENT:
        before = rerun._task.weights.grad
        before = torch.zeros(50) if before is None else before.clone()
        result = rerun.run(batch, torch.tensor(0.5)).result
        begins, total = [], 0
        for row in batch.document_lengths:
            for size in row:
                begins.append(total)
                total += size
        room = len(rerun._task.read[-1][0]) - len(begins)
        expected = torch.arange(1.0, 51.0, requires_grad=True)
        squares = sum(begin**2 for begin in begins) + room * total**2
        loss = (expected[batch.input_ids] * batch.targets).sum() + expected[0] * squares
        (loss * 0.5).backward()
        assert rerun._task.read[-1] == (begins + [total] * room, 128)
        torch.testing.assert_close(result.loss_sum.detach(), loss.detach())
        torch.testing.assert_close(result.metrics["twice"], 2 * loss.detach())
        torch.testing.assert_close(rerun._task.weights.grad - before, expected.grad, rtol=1e-4, atol=0.05)
    assert rerun.ran == ["eager", "eager", (8, 128)]  # the third has five documents, and room is for half as many again


def test_more_documents_than_a_graph_has_room_for_take_a_larger_one(rerun):
    few, more = packed((64, 64)), packed((10, 20, 30, 40, 28))
    for _ in range(graphs.WARM_UP + 1):
        rerun.run(few, torch.ones(()))
    rerun.run(more, torch.ones(()))
    rerun.run(few, torch.ones(()))
    assert rerun.ran == ["eager"] * graphs.WARM_UP + [(4, 128), (8, 128)]
    assert [len(begins) for begins, _ in rerun._task.read] == [4, 4, 4, 8, 4]


def test_what_comes_again_and_needs_far_less_gets_a_graph_of_its_own(rerun):
    many, few = packed((1,) * 8 + (120,)), packed((128,))
    for _ in range(graphs.WARM_UP + 1):
        rerun.run(many, torch.ones(()))
    for _ in range(3):
        rerun.run(few, torch.ones(()))
    assert rerun.ran == ["eager"] * graphs.WARM_UP + [(16, 128), (4, 128)]
    read = [len(begins) for begins, _ in rerun._task.read[graphs.WARM_UP + 1 :]]
    assert read == [16, 4, 4]


def test_rows_of_which_little_is_trained_get_a_graph_that_runs_less_through_the_head(rerun):
    few = replace(Rows(), num_trained_tokens=30)
    for _ in range(graphs.WARM_UP + 3):
        rerun.run(few, torch.ones(()))
    rerun.run(Rows(), torch.ones(()))
    assert rerun.ran == ["eager"] * graphs.WARM_UP + [(0, 0), (0, 0)]
    # The first time with room for all 128 positions, and again where more are trained.
    assert rerun._task.trained == [128, 128, 32, 128]


def test_without_room_for_more_graphs_a_batch_takes_any_that_holds_it_or_runs_as_always(rerun, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    for _ in range(graphs.WARM_UP + 1):
        rerun.run(packed((10, 20, 30, 40, 28)), torch.ones(()))
    rerun.run(packed((128,)), torch.ones(()))
    assert rerun.ran == ["eager"] * graphs.WARM_UP + [(8, 128)]

    rerun._task.reads_lengths = True
    rerun.run(packed((1,) * 128), torch.ones(()))
    assert rerun.ran[-1] == "eager"


def test_graphs_are_captured_ahead_for_what_ran_before_alone(rerun):
    few, more, padded = packed((64, 64)), packed((10, 20, 30, 40, 28)), Rows()
    assert rerun.capture([few, more]) == 0
    for _ in range(graphs.WARM_UP):
        rerun.run(few, torch.ones(()))
    read = len(rerun._task.read)
    assert rerun.capture([few, more, padded, few]) == 2
    assert len(rerun._task.read) == read  # nothing ran
    assert set(rerun._captured) == {GraphShape(1, 128, 128, 4, 128), GraphShape(1, 128, 128, 8, 128)}
    rerun.run(more, torch.ones(()))
    assert rerun.ran == ["eager"] * graphs.WARM_UP + [(4, 128), (8, 128)]
