"""Counts of prepared rows, kept for plans: as exact as the loader's own, and gone when a file changes."""

import json

import pytest
from rich.console import Console

from stoker.compose import prepare
from stoker.compose.counted import counted
from stoker.compose.data import loader, prepare_data
from stoker.compose.model import load_tokenizer, open_base
from stoker.compose.sample import known_documents
from stoker.config.load import parse
from stoker.plan.workload import workload


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = [
        {"messages": [{"role": "user", "content": "hello " * (1 + n % 7)}, {"role": "assistant", "content": "w " * n}]}
        for n in range(3, 90)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return file


def config(tmp_path, rows, *overrides):
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "data": {"train": [{"path": str(rows)}], "sequence_length": 128, "cache_folder": str(tmp_path / "cache")},
        "train": {"learning_rate": 1e-4, "epochs": 3, "batch_size": 4},
        "output": {"folder": str(tmp_path / "run")},
    }
    return parse(values, overrides)


@pytest.mark.parametrize("overrides", [(), ("data.validation=0.2",), ("data.validation=9",), ("data.packing=false",)])
def test_steps_fill_and_trained_share_are_those_of_the_loader(tmp_path, rows, overrides):
    asked = config(tmp_path, rows, *overrides)
    assert counted(asked) is None
    prepare.prepare_ahead(asked, console=Console(quiet=True))
    known = counted(asked)
    tokenizer = load_tokenizer(open_base("builtin:tiny-llama"))
    data = prepare_data(asked, tokenizer, console=Console(quiet=True))
    steps = loader(asked, data.train, micro_batch_size=1, pad_id=0)
    work = workload(asked, known)
    assert work.steps == 3 * steps.steps_per_epoch
    assert sum(known.lengths.values()) == known.count
    trained = sum(batch.num_trained_tokens for n in range(steps.steps_per_epoch) for batch in steps.step(n))
    assert trained == pytest.approx(known.trained_share * known.mean * known.count, rel=0.02)
    assert "counted when the rows were prepared" in known_documents(asked).source


def test_counts_of_files_that_have_changed_are_not_taken(tmp_path, rows):
    asked = config(tmp_path, rows)
    prepare.prepare_ahead(asked, console=Console(quiet=True))
    assert counted(config(tmp_path, rows, "data.sequence_length=64")) is None
    assert counted(config(tmp_path, rows, "train.learning_rate=0.01")) is not None
    with rows.open("a") as file:
        file.write("\n")
    assert counted(asked) is None
    assert "sampled" in known_documents(asked).source
