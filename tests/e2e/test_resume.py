"""A run that is killed, interrupted or damaged goes on exactly where it was."""

import json
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# What differs from run to run on the same machine: clocks, and memory.
_MEASURED = {"seconds", "tokens_per_second", "memory_bytes"}


def metrics(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in _MEASURED} for record in records]


def weights(run):
    return load_file(run / "adapter/adapter_model.safetensors")


def assert_same(run, unbroken):
    assert metrics(run) == metrics(unbroken)
    ours, theirs = weights(run), weights(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def long_run(run_values):
    # Packed, with dropout, an epoch's end inside, and saves that rarely coincide with the kill.
    run_values["data"]["packing"] = True
    run_values["train"] |= {"steps": 40, "evaluate_every_steps": 7}
    run_values["output"]["save_every_steps"] = 5
    return run_values


def test_run_killed_several_times_equals_an_unbroken_one(stoker, long_run, write_yaml, tmp_path):
    unbroken = {**long_run, "output": {**long_run["output"], "folder": "unbroken"}}
    stoker("train", write_yaml(unbroken, "unbroken.yaml"))
    yaml = write_yaml(long_run)
    generator, resume, kills = random.Random(7), (), 0
    for lines in sorted(generator.sample(range(3, 40), 4)):
        code, _ = stoker.killed_at("train", yaml, *resume, metrics=tmp_path / "run/metrics.jsonl", lines=lines)
        kills += code == -signal.SIGKILL
        resume = ("--resume",)
    assert kills >= 3, "the run ended before it could be killed"
    stoker("train", yaml, "--resume")
    assert_same(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_the_resumed_run_equals_an_unbroken_one(stoker, long_run, write_yaml, tmp_path, number, code):
    unbroken = {**long_run, "output": {**long_run["output"], "folder": "unbroken"}}
    stoker("train", write_yaml(unbroken, "unbroken.yaml"))
    yaml = write_yaml(long_run)
    ended, said = stoker.killed_at("train", yaml, metrics=tmp_path / "run/metrics.jsonl", lines=12, number=number)
    assert ended == code, said
    assert "--resume" in said
    stoker("train", yaml, "--resume")
    assert_same(tmp_path / "run", tmp_path / "unbroken")


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(stoker, run_values, write_yaml, tmp_path):
    yaml = write_yaml(run_values)
    stoker("train", yaml)
    unbroken = tmp_path / "unbroken"
    shutil.copytree(tmp_path / "run", unbroken)
    newest = tmp_path / "run/checkpoints/step-000008/weights.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    said = stoker("train", yaml, "--resume").stdout
    assert "not whole" in said
    assert "step-000006" in said
    assert_same(tmp_path / "run", unbroken)


def test_resume_refuses_what_would_make_it_another_run(stoker, run_values, write_yaml):
    yaml = write_yaml(run_values)
    stoker("train", yaml)
    said = stoker("train", yaml, "--resume", "--set", "train.batch_size=8", "--set", "adapter.rank=2", code=2).stderr
    assert "train.batch_size was 4" in said
    assert "adapter.rank was 4" in said


def test_resume_says_that_the_rows_are_others(stoker, run_values, write_yaml, tmp_path):
    yaml = write_yaml(run_values)
    stoker("train", yaml)
    assert "not what the run began with" not in stoker("train", yaml, "--resume").stdout
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[1:]))
    said = stoker("train", yaml, "--resume").stdout
    assert "The data is not what the run began with: data.train: the number of documents was " in said
    assert "--overwrite starts anew." in said


def test_resume_keeps_the_choices_that_exactness_depends_on(stoker, long_run, write_yaml, tmp_path):
    # Where memory is scarcer when the run goes on, the plan alone would cut micro-batches otherwise.
    long_run["train"]["steps"] = 6
    long_run["adapter"]["dropout"] = 0.0
    yaml = write_yaml(long_run)
    stoker("train", yaml)
    path = tmp_path / "run/plan.json"
    plan = json.loads(path.read_text())
    assert plan["micro_batch_size"] == 4
    assert (plan["layers"], plan["recompute"]) == ("op by op", "keep all")
    scarce = {"layers": "fused", "keep": ["mixer"] * len(plan["keep"]), "tile_tokens": 64}
    path.write_text(json.dumps(plan | {"micro_batch_size": 2} | scarce))
    stoker("train", yaml, "--resume", "--set", "train.steps=8")
    resumed = json.loads(path.read_text())
    assert resumed["micro_batch_size"] == 2
    assert resumed["reasons"]["micro_batch_size"] == "as when the run began"
    assert {name: resumed[name] for name in scarce} == scarce
    assert resumed["reasons"]["tile_tokens"] == "as when the run began"
    # What the user sets is not overruled.
    stoker("train", yaml, "--resume", "--set", "train.steps=9", "--set", "engine.recompute=none")
    assert json.loads(path.read_text())["recompute"] == "keep all"


def test_a_run_resumed_at_its_end_keeps_what_was_measured(stoker, run_values, write_yaml, tmp_path):
    yaml = write_yaml(run_values)
    stoker("train", yaml)
    before = json.loads((tmp_path / "run/run.json").read_text())
    assert "Predicted over measured: memory" not in stoker("train", yaml, "--resume").stdout
    after = json.loads((tmp_path / "run/run.json").read_text())
    assert [after[name] for name in ("memory", "step_seconds")] == [before[name] for name in ("memory", "step_seconds")]


def test_nothing_to_resume_is_said(stoker, run_values, write_yaml):
    assert "no run to resume" in stoker("train", write_yaml(run_values), "--resume", code=2).stderr
