"""What graphs of micro-batches do when a capture fails; capturing itself needs a GPU (tests/kernels/test_graphs.py)."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from stoker.distributed import graphs
from stoker.distributed.graphs import MicroBatchGraphs, Ran


@dataclass
class Rows:
    input_ids: Tensor = field(default_factory=lambda: torch.zeros(2, 64, dtype=torch.int64))
    targets: Tensor = field(default_factory=lambda: torch.zeros(2, 64, dtype=torch.int64))
    document_lengths: None = None
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

            def _capture(self, batch):
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
