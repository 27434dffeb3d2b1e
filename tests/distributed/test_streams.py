"""Runs whose rows are streamed, or prepared beside the training, in two processes as on one."""

import io
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from rich.console import Console

from stoker.compose.train import train
from stoker.config.load import load_with_origins
from stoker.distributed.ranks import end_process

STEPS = 8
MODES = {
    "streaming": {"streaming": True, "num_workers": 1},
    "mixed": {"streaming": True, "train": [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1}]},
    "overlap": {"prepare": "overlap"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two files of rows and a YAML for each mode."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 40), ("b", 20)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {n}?"},
                    {"role": "assistant", "content": str(n) * (n % 9)},
                ]
            }
            for n in range(1, count)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for mode, data in MODES.items():
        values = {
            "model": {"base": "builtin:tiny-llama"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {
                "train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
                "sequence_length": 64,
                "window_sequences": 2,
                "cache_folder": f"cache {mode}",
                **data,
            },
            "train": {"steps": STEPS, "batch_size": 2, "learning_rate": 0.01},
            "engine": {"device": "cpu", "num_threads": 1, "micro_batch_size": 1},
            "output": {"trackers": [], "save_every_steps": 3, "keep_last": 9},
        }
        Path(f"{mode}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def run(mode, output, *, steps=STEPS, resume=False):
    settings = [f"output.folder={output}", f"train.steps={steps}"]
    loaded = load_with_origins(f"{mode}.yaml", settings)
    result = train(loaded, resume_run=resume, console=Console(file=io.StringIO()))
    assert result.step == steps


def in_each_process(rank, ports, modes):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    for mode in modes:
        # Steps 4 to 8 of the second on two processes, from where one process stood.
        for output, resume in ((f"two {mode}", False), (f"one then two {mode}", True)):
            os.environ["MASTER_PORT"] = str(ports.pop())
            run(mode, output, resume=resume)
    end_process(0)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def losses(folder, output):
    lines = (folder / output / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "learning_rate" in row}


@pytest.mark.skipif(os.environ.get("STOKER_TEST_ALL") != "1", reason="make test-distributed runs it")
def test_two_processes_give_the_losses_of_one_also_from_its_checkpoint(folder):
    for mode in MODES:
        run(mode, f"one {mode}")
        run(mode, f"one then two {mode}")
        for step in (6, 8):
            for file in (folder / f"one then two {mode}/checkpoints/step-{step:06d}").rglob("*"):
                file.unlink()
            (folder / f"one then two {mode}/checkpoints/step-{step:06d}").rmdir()
    mp.spawn(in_each_process, args=(free_ports(2 * len(MODES)), list(MODES)), nprocs=2)
    for mode in MODES:
        alone = losses(folder, f"one {mode}")
        assert len(alone) == STEPS
        assert losses(folder, f"two {mode}") == pytest.approx(alone, rel=1e-5)
        assert losses(folder, f"one then two {mode}") == pytest.approx(alone, rel=1e-5)
