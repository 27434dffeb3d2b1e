"""`stoker train --gpus 2` as a user starts it: processes that die, signals, and runs that go on over other counts."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

pytestmark = pytest.mark.skipif(os.environ.get("STOKER_TEST_ALL") != "1", reason="make test-distributed runs it")


@pytest.fixture
def run(tmp_path):
    """Writes a run and returns what starts it with options, as a process."""
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n} plus one?"}, {"role": "assistant", "content": str(n)}]}
        for n in range(24)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": [{"path": "train.jsonl"}], "sequence_length": 64, "packing": False, "cache_folder": "cache"},
        "train": {"steps": 30, "batch_size": 4, "learning_rate": 0.01},
        "engine": {"device": "cpu", "num_threads": 1},
        "output": {"folder": "run", "save_every_steps": 4, "trackers": []},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    def start(*options):
        command = [sys.executable, "-m", "stoker.cli.main", "train", "run.yaml", *map(str, options)]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def ended(process, code):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def wait_for(metrics, lines, process):
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= lines):
        time.sleep(0.01)


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def kill_one(process):
    psutil.Process(process.pid).children()[-1].send_signal(signal.SIGKILL)


def test_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_been(run, tmp_path):
    ended(run("--gpus", 2, "--set", "output.folder=unbroken"), 0)
    process = run("--gpus", 2, "--max-restarts", 1)
    wait_for(tmp_path / "run" / "metrics.jsonl", 10, process)
    kill_one(process)
    ended(process, 0)
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


def test_a_death_is_named_a_signal_saves_and_another_count_goes_on(run, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = run("--gpus", 2)
    wait_for(metrics, 6, process)
    kill_one(process)
    assert "it was killed by SIGKILL" in ended(process, 137)
    process = run("--gpus", 2, "--resume", "--set", "engine.strategy=fsdp2")
    wait_for(metrics, 12, process)
    process.send_signal(signal.SIGTERM)
    ended(process, 128 + signal.SIGTERM)
    output = ended(run("--resume"), 0)
    assert "Resuming from" in output
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
    assert sorted(set(steps)) == list(range(1, 31))


def test_a_mistake_is_told_once_with_its_exit_code(run):
    output = ended(run("--gpus", 2, "--set", "train.batch_size=3"), 2)
    assert output.count("cannot be dealt out to 2 processes") == 1
