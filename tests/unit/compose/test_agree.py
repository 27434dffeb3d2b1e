"""What processes tell each other before they begin; the others' answers are put in by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from stoker.compose import agree, parallel
from stoker.compose.data import Data
from stoker.compose.run_folder import RunFolder
from stoker.config.load import parse
from stoker.data.prepared import Prepared
from stoker.distributed.ranks import Place, Ranks
from stoker.errors import TrainingError
from stoker.plan.hardware import Device, Hardware


class Two(Ranks):
    """Rank 0 of two; the other says what `other` makes of this one's word."""

    def __init__(self, other):
        super().__init__(Place(0, 2, 0, "torchrun"))
        self._other = other

    def gather(self, value):
        return [value, self._other(value)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


def data(documents, held_out=None):
    made = [Prepared.from_documents(part) for part in (documents, held_out) if part is not None]
    return Data(made[0], made[1] if held_out is not None else None, {}, ())


ROWS = [([1, 2, 3], [False, True, True]), ([4, 5], [False, True])]


def test_settings_that_differ_are_named_with_both_values():
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": {"learning_rate": 1e-4},
        "output": {"folder": "run"},
    }

    def theirs(mine):
        return {**mine, "train.learning_rate": 2e-4, "train.optimizer.kind": "sgd", "train.optimizer.momentum": 0.9}

    parallel.require_same(Two(dict), parse(values))
    with pytest.raises(TrainingError) as raised:
        parallel.require_same(Two(theirs), parse(values))
    said = str(raised.value)
    assert "differ in train.learning_rate: rank 0 has 0.0001, rank 1 has 0.0002; in train.optimizer.kind" in said
    assert "train.optimizer.momentum: rank 0 has None, rank 1 has 0.9" in said
    assert "sequence_length" not in said


@pytest.mark.parametrize(
    ("theirs", "fact"),
    [
        (ROWS[:1], "data.train: the number of documents: rank 0 has 2, rank 1 has 1"),
        (
            [*ROWS[:1], ([4, 5, 6], [False, True, False])],
            "data.train: the number of tokens: rank 0 has 5, rank 1 has 6",
        ),
        ([*ROWS[:1], ([4, 5], [False, False])], "data.train: the number of trained tokens: rank 0 has 3, rank 1 has 2"),
        ([*ROWS[:1], ([4, 6], [False, True])], "data.train: its content (a hash): rank 0 has "),
    ],
)
def test_data_that_differs_is_named_by_the_plainest_difference(tokenizer, theirs, fact):
    other = agree.facts_of_data(data(theirs), tokenizer)
    with pytest.raises(TrainingError) as raised:
        agree.require_same_data(Two(lambda mine: other), data(ROWS), tokenizer)
    assert fact in str(raised.value)


def test_the_same_data_passes_and_held_out_rows_and_the_tokenizer_count_too(tokenizer):
    agree.require_same_data(Two(dict), data(ROWS, ROWS), tokenizer)
    facts = agree.facts_of_data(data(ROWS, ROWS), tokenizer)
    assert facts != agree.facts_of_data(data(ROWS, ROWS[:1]), tokenizer)
    other = {**facts, "the tokenizer (its hash)": "000000000000"}
    with pytest.raises(TrainingError, match="the tokenizer"):
        agree.require_same_data(Two(lambda mine: other), data(ROWS, ROWS), tokenizer)


def test_a_process_that_does_not_see_the_runs_folder_is_named(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.config.write_text("train: {}\n")
    agree.require_shared_folder(Two(lambda mine: mine), folder)
    with pytest.raises(TrainingError, match=r"is not the same folder on every machine.* for rank 1 \(gpu07\)"):
        agree.require_shared_folder(Two(lambda mine: ("gpu07", False)), folder)
    # This one is blind itself: the first process wrote something else.
    monkeypatch.setattr(agree, "_SEEN_SECONDS", 0.0)
    blind = Two(lambda mine: ("gpu07", True))
    blind.share = lambda make: "another hash"
    with pytest.raises(TrainingError, match="for rank 0"):
        agree.require_shared_folder(blind, folder)


def test_gpus_that_differ_are_told_of_each_with_its_machine():
    mine = {"host": "gpu01", "type": "H100", "memory": "80 GiB", "driver": "580.1"}
    assert agree.different([mine, {**mine, "host": "gpu02"}]) == []
    (sentence,) = agree.different([mine, mine, {**mine, "host": "gpu03", "type": "A100"}])
    assert "differ in type: rank 0 (gpu01) has H100, rank 2 (gpu03) has A100" in sentence
    assert len(agree.different([mine, {}])) == 3


def test_the_plan_is_for_the_least_of_the_devices():
    def gpu(memory, capability=(9, 0)):
        return Hardware((Device("cuda", "GPU", memory, compute_capability=capability),))

    assert agree.smallest(Two(lambda mine: gpu(70)), gpu(80)) == gpu(70)
    assert agree.smallest(Two(lambda mine: gpu(90, (8, 0))), gpu(80)) == gpu(90, (8, 0))


def test_alone_there_is_nothing_to_compare_or_to_watch(tmp_path):
    agree.require_same_data(Ranks(), SimpleNamespace(), SimpleNamespace())
    agree.require_shared_folder(Ranks(), RunFolder(tmp_path))
    with agree.watched(Ranks(), RunFolder(tmp_path), 1.0) as at:
        at("reading data", 0)
    assert not (tmp_path / "hang").exists()
    assert not torch.distributed.is_initialized()
