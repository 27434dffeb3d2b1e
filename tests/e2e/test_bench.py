"""`stoker bench` as a user runs it."""

import csv
import json
import math
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_bench_measures_a_run_beside_a_peer_and_writes_what_it_found(stoker, run_values, write_yaml):
    run_values["train"] = {"batch_size": 4, "learning_rate": 0.01}
    run_values["adapter"] = {"rank": 4, "alpha": 8}
    del run_values["data"]["validation"]
    run = write_yaml(run_values, "cell.yaml")
    done = stoker("bench", run, "--steps", 2, "--peers", "hf,unsloth", "--out", "out.json", "--commit", "abc")
    assert "There is no GPU here" in done.stdout
    assert "unsloth is left out" in done.stdout
    facts = json.loads((stoker.folder / "out.json").read_text())
    assert (facts["cell"], facts["commit"], facts["steps"], facts["rows"]) == ("cell", "abc", 2, "4 x 128")
    assert facts["plan"]["device"] == "cpu"
    assert {"torch", "transformers", "stoker", "python"} <= facts["versions"].keys()
    ours, theirs = facts["results"]
    assert (ours["name"], theirs["name"], theirs["error"]) == ("stoker", "hf", "")
    for row in (ours, theirs):
        assert row["gradient_norm"] > 0
        assert math.isfinite(row["loss"])
        assert row["tokens_per_second"] == pytest.approx(4 * 128 / row["step_seconds"], rel=0.5)
        assert row["peak_bytes"] > 2**26
        assert row["share_of_floor"] > 0
        assert row["load_seconds"] > 0
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)
    assert theirs["stoker_speed_ratio"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    assert len(facts["losses"]["stoker"]) == 5
    with (stoker.folder / "out.csv").open(newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == ["stoker", "hf"]


@pytest.mark.slow
def test_our_numbers_are_kept_when_no_time_is_left_for_a_peer(stoker, run_values, write_yaml):
    run_values["train"] = {"batch_size": 2, "learning_rate": 0.01}
    del run_values["data"]["validation"]
    stoker("bench", write_yaml(run_values), "--steps", 1, "--peers", "hf", "--out", "out.json", "--budget", 1)
    ours, theirs = json.loads((stoker.folder / "out.json").read_text())["results"]
    assert ours["tokens_per_second"] > 0
    assert theirs["error"] == "it did not end within 0 s"
    assert theirs["tokens_per_second"] is None


@pytest.mark.slow
def test_a_profile_says_where_a_steps_time_goes(stoker, run_values, write_yaml):
    run_values["train"] = {"batch_size": 2, "learning_rate": 0.01}
    del run_values["data"]["validation"]
    done = stoker("bench", write_yaml(run_values), "--steps", 1, "--profile", "kernels.csv")
    assert "one step by kernel" in done.stdout
    with (stoker.folder / "kernels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    times = [float(line["milliseconds"]) for line in lines]
    assert times == sorted(times, reverse=True)
    assert any(line["name"] == "aten::mm" and int(line["calls"]) > 1 for line in lines)


def test_mistakes_are_sentences(stoker, run_values, write_yaml):
    run = write_yaml(run_values)
    assert "there is no such peer" in stoker("bench", run, "--peers", "trl", code=2).stderr
    assert "must end in .json" in stoker("bench", run, "--out", "out.csv", code=2).stderr
    wrong = stoker("bench", run, "--set", "model.base=shape:gpt-5", code=2)
    assert "Known: shape:llama-3.1-8b" in wrong.stderr


def test_help_loads_no_torch():
    code = (
        "import sys; sys.argv = ['stoker', 'bench', '--help']\n"
        "from stoker.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--peers" in done.stdout
