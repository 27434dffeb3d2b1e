"""`stoker train --gpus 2` as a user starts it: processes that die, signals, and runs that go on over other counts."""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from stoker.compose.job_files import Job, torchrun_line

pytestmark = pytest.mark.skipif(os.environ.get("STOKER_TEST_ALL") != "1", reason="make test-distributed runs it")


# What goes wrong in a process, and when; each process reads it as it starts.
FAULTS = """
import os, signal, sys, time

def hangs_here(number, frame):
    time.sleep(600)

def dies_there(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(os.environ["DIES_NAMING"]):
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") is not None:
    signal.signal(signal.SIGUSR1, hangs_here)
    if "DIES_NAMING" in os.environ and os.environ["RANK"] == os.environ["STOKER_RESTART_COUNT"] == "0":
        sys.addaudithook(dies_there)
"""


class Folder:
    """A folder with a run in it, and what starts it as a process."""

    def __init__(self, path):
        self.path = path
        self.metrics = path / "run" / "metrics.jsonl"
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {n} plus one?"},
                    {"role": "assistant", "content": str(n)},
                ]
            }
            for n in range(24)
        ]
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": {"base": "builtin:tiny-llama"},
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {
                "train": [{"path": "train.jsonl"}],
                "sequence_length": 64,
                "packing": False,
                "cache_folder": "cache",
            },
            "train": {"steps": 30, "batch_size": 4, "learning_rate": 0.01},
            "engine": {"device": "cpu", "num_threads": 1},
            "output": {"folder": "run", "save_every_steps": 4, "trackers": []},
        }
        (path / "run.yaml").write_text(yaml.safe_dump(values))
        (path / "sitecustomize.py").write_text(FAULTS)

    def start(self, *options, module=(), **environment):
        """Starts `stoker train` in a process; `module`: by what else than itself."""
        paths = f"{self.path}:{os.environ.get('PYTHONPATH', '')}"
        return subprocess.Popen(
            [sys.executable, *map(str, module), "-m", "stoker.cli.main", "train", "run.yaml", *map(str, options)],
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": paths} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def weights(self):
        return (self.path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()

    def steps(self):
        return [row["step"] for row in map(json.loads, self.metrics.read_text().splitlines()) if "loss" in row]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def run(folder):
    return folder.start


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The weights that two processes end with when nothing happens to them."""
    folder = Folder(tmp_path_factory.mktemp("unbroken"))
    ended(folder.start("--gpus", 2), 0)
    return folder.weights()


def ended(process, code):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    return output


def wait_for(metrics, lines, process):
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= lines):
        time.sleep(0.01)


def child_of_rank(process, rank):
    """The process of a rank, among those that `process` has started."""
    return next(one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == str(rank))


def kill_one(process, rank=1):
    child_of_rank(process, rank).send_signal(signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_been(folder, unbroken, rank):
    process = folder.start("--gpus", 2, "--max-restarts", 1)
    wait_for(folder.metrics, random.randrange(2, 25), process)
    kill_one(process, rank)
    ended(process, 0)
    assert folder.weights() == unbroken


def test_a_process_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(folder, unbroken):
    process = folder.start("--gpus", 2, "--max-restarts", 1, DIES_NAMING="step-000008")
    output = ended(process, 0)
    assert output.count("all were started again (1 of 1 restarts)") == 1
    assert "Resuming from run/checkpoints/step-000004 after step 4" in output  # with step 8 done, and not yet saved
    assert folder.weights() == unbroken


def test_a_row_that_a_process_cannot_take_ends_the_run_at_once(folder):
    """A restart would find it again; the first rows are sound, so that no process knows before."""
    with (folder.path / "train.jsonl").open("a") as rows:
        rows.write(
            "".join(json.dumps({"messages": [{"role": "user", "content": "Hello"}] * 2}) + "\n" for _ in range(9))
        )
        rows.write('{"messages": "none"}\n')
    output = ended(folder.start("--gpus", 2, "--max-restarts", 3), 2)
    assert output.count("error:") == 1
    assert "train.jsonl:34: " in output
    assert "started again" not in output


def test_a_process_that_hangs_is_named_and_ends_them_all(folder):
    process = folder.start("--gpus", 2, "--set", "engine.hang_timeout=4")
    wait_for(folder.metrics, 6, process)
    child_of_rank(process, 1).send_signal(signal.SIGUSR1)
    output = ended(process, 1)
    assert output.count("error:") == 1
    assert "rank 1 (" in output
    # A step's line is written while the next one is under way, and the one that hangs may have begun that.
    steps = [folder.steps()[-1] + begun for begun in (1, 2)]
    assert any(f"has not finished step {step}" in output for step in steps), output
    assert "Where its Python threads stood: run/hang/rank-1.txt" in output
    assert "hangs_here" in (folder.path / "run" / "hang" / "rank-1.txt").read_text()


def agents(folder, count=2):
    """Starts torchrun as so many machines would, each with one process."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    job = Job("run.yaml", "test", nodes=count, gpus_per_node=1, output="run", cache="cache")
    line = torchrun_line(job, "localhost").replace("\\\n", "").replace(":29500", f":{port}")
    setting, _, *command = shlex.split(line)
    options = command[: command.index("-m")]
    after = command[command.index("run.yaml") + 1 :]
    environment = dict([setting.split("=")])
    return lambda: folder.start(*after, module=("-m", "torch.distributed.run", *options), **environment)


def test_machines_that_torchrun_starts_on_find_each_other(folder, unbroken):
    start = agents(folder)
    machines = [start(), start()]
    for machine in machines:
        ended(machine, 0)
    assert folder.weights() == unbroken


def test_accelerate_launch_starts_the_same_run(folder, unbroken):
    """Without a GPU, `--multi_gpu` has accelerate start processes as torchrun does, here on a CPU."""
    options = ("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no")
    launcher = ("-m", "accelerate.commands.launch", *options, "--main_process_port", 0)
    ended(folder.start(module=launcher), 0)
    assert folder.weights() == unbroken


def test_a_machine_that_is_lost_is_replaced_and_the_run_ends_as_if_nothing_had_been(folder, unbroken):
    start = agents(folder)
    stays = start()
    time.sleep(2.0)  # the first to come holds the meeting point
    lost = start()
    wait_for(folder.metrics, 10, stays)
    for one in [*psutil.Process(lost.pid).children(recursive=True), psutil.Process(lost.pid)]:
        one.kill()
    lost.communicate()
    replacement = start()
    ended(stays, 0)
    ended(replacement, 0)
    assert folder.weights() == unbroken


def test_a_death_is_named_a_signal_saves_and_another_count_goes_on(run, folder):
    metrics = folder.metrics
    process = run("--gpus", 2)
    wait_for(metrics, 6, process)
    kill_one(process)
    assert "rank 1 of 2" in (output := ended(process, 137))
    assert "it was killed by SIGKILL" in output
    process = run("--gpus", 2, "--resume", "--set", "engine.strategy=fsdp2")
    wait_for(metrics, 12, process)
    process.send_signal(signal.SIGTERM)
    ended(process, 128 + signal.SIGTERM)
    output = ended(run("--resume"), 0)
    assert "Resuming from" in output
    assert sorted(set(folder.steps())) == list(range(1, 31))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_alone_is_told_and_the_run_can_go_on(run, folder, rank):
    process = run("--gpus", 2, "--max-restarts", 2)
    wait_for(folder.metrics, 6, process)
    child_of_rank(process, rank).send_signal(signal.SIGINT)
    output = ended(process, 128 + signal.SIGINT)
    assert output.count("error:") == 1
    assert f"error: rank {rank} of 2 (process " in output
    assert "was interrupted by SIGINT, so all saved and ended. --resume goes on from there." in output
    ended(run("--gpus", 2, "--resume"), 0)
    assert sorted(set(folder.steps())) == list(range(1, 31))


def test_a_mistake_is_told_once_with_its_exit_code(run):
    output = ended(run("--gpus", 2, "--set", "train.batch_size=3"), 2)
    assert output.count("cannot be dealt out to 2 processes") == 1
