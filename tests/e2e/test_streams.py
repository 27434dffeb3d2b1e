"""Rows that are streamed, prepared beside the training, mixed by weight or prepared ahead, from the YAML on."""

import io
import json
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from stoker.compose.inspect import inspect
from stoker.compose.prepare import look_after_cache, prepare_ahead
from stoker.compose.train import train
from stoker.config.load import load_with_origins
from stoker.errors import DataError


@pytest.fixture
def values(run_values, tmp_path):
    """Two files of rows, packed, with saves that split windows and passes."""
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    data = run_values["data"]
    data |= {"packing": True, "window_sequences": 2, "train": [{"path": "train.jsonl"}, {"path": "more.jsonl"}]}
    data.pop("validation", None)
    run_values["train"] = {"steps": 11, "batch_size": 2, "learning_rate": 1e-2}
    run_values["output"] |= {"save_every_steps": 4}
    return run_values


MIXED = [{"path": "train.jsonl", "weight": 2.0}, {"path": "more.jsonl", "weight": 1.0}]
MODES = {
    "streaming": {"streaming": True},
    "streaming with workers": {"streaming": True, "num_workers": 1},
    "streaming, mixed": {"streaming": True, "train": MIXED},
    "overlap": {"prepare": "overlap"},
    "ahead, mixed": {"train": MIXED},
}


@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_equals_an_unbroken_one(mode, values, write_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values["data"] |= MODES[mode]
    yaml = write_yaml(values)
    console = Console(file=io.StringIO(), width=200)
    result = train(load_with_origins(yaml, []), console=console)
    assert (result.reason, result.step) == ("finished", 11)
    losses = metrics(tmp_path / "run")
    assert len(losses) == 11
    shutil.copytree(tmp_path / "run", tmp_path / "unbroken")
    for step in (8, 11):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    shutil.rmtree(tmp_path / "run/adapter")
    train(load_with_origins(yaml, []), resume_run=True, console=console)
    assert metrics(tmp_path / "run") == losses
    ours, theirs = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("run", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    said = console.file.getvalue()
    assert ("data.train is streamed" in said) == ("streaming" in mode)
    assert ("prepared while training runs" in said) == (mode == "overlap")


def metrics(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "learning_rate" in record}


def test_overlap_keeps_what_it_prepares_and_does_not_depend_on_it(values, write_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values["data"]["prepare"] = "overlap"
    yaml = write_yaml(values)
    console = Console(file=io.StringIO(), width=200)
    train(load_with_origins(yaml, []), console=console)
    first = metrics(tmp_path / "run")
    cache = next(path for path in tmp_path.rglob("manifest.json"))
    assert json.loads(cache.read_text())["audit"]["rows"] > 0
    train(load_with_origins(yaml, []), overwrite=True, console=console)
    assert metrics(tmp_path / "run") == first


def test_prepare_ahead_list_and_prune(values, write_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_with_origins(write_yaml(values), []).config

    def said(command, *arguments, **options):
        console = Console(file=io.StringIO(), width=80)
        command(*arguments, **options, console=console)
        return console.file.getvalue()

    assert re.search(
        r"train +48 chat documents.*packed into \d+ sequences of 128, \d+.\d% full", said(prepare_ahead, config)
    )
    assert "prepared before, from" in said(prepare_ahead, config)
    listed = said(look_after_cache, config, list_entries=True, prune=False)
    assert re.search(r"48  train\.jsonl, more\.jsonl +current$", listed, re.MULTILINE)
    (tmp_path / "more.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    pruned = said(look_after_cache, config, list_entries=True, prune=True)
    assert "more.jsonl has changed" in pruned
    assert "holds no prepared data" in pruned


def test_inspect_does_not_call_rows_sound_that_no_task_learns_from(values, write_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    values["data"] |= {"train": [{"path": "pairs.jsonl"}], "validation": None}
    console = Console(file=io.StringIO(), width=200)
    inspect(load_with_origins(write_yaml(values), []).config, rows=0, split="train", console=console)
    shown = console.file.getvalue()
    assert "they are pairs, which task sft does not learn from." in shown
    assert "Nothing in the data stops a run" not in shown


@pytest.mark.parametrize(
    "mode", [{}, {"streaming": True}, {"prepare": "overlap"}], ids=["ahead", "streaming", "overlap"]
)
def test_rows_that_judge_answers_are_not_trained_on(mode, values, write_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 40)
    values["data"] |= {"train": [{"path": "pairs.jsonl"}]} | mode
    with pytest.raises(DataError, match=r"the rows are pairs .* which task sft does not learn from"):
        train(load_with_origins(write_yaml(values), []), console=Console(file=io.StringIO()))


def test_a_streamed_source_may_leave_ends_of_turns_untrained(values, write_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values["data"] |= {"streaming": True, "train": [{"path": "train.jsonl", "chat": {"train_on_end_of_turn": "none"}}]}
    values["train"]["steps"] = 1
    result = train(load_with_origins(write_yaml(values), []), console=Console(file=io.StringIO()))
    assert (result.reason, result.step) == ("finished", 1)


def test_prepare_asks_for_a_run(stoker):
    assert "Name a run: stoker prepare run.yaml" in stoker("prepare", code=2).stderr
