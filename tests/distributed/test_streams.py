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
            {"messages": [{"role": "user", "content": f"{name} {n}?"}, {"role": "assistant", "content": str(n) * (n % 9)}]}
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


def in_each_process(rank, port, modes):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    for number, mode in enumerate(modes):
        os.environ["MASTER_PORT"] = str(port + number)
        run(mode, f"two {mode}")
        # Steps 4 to 8 on two processes, from where one process stood.
        run(mode, f"one then two {mode}", resume=True)


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
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    mp.spawn(in_each_process, args=(port, list(MODES)), nprocs=2)
    for mode in MODES:
        alone = losses(folder, f"one {mode}")
        assert len(alone) == STEPS
        assert losses(folder, f"two {mode}") == pytest.approx(alone, rel=1e-5)
        assert losses(folder, f"one then two {mode}") == pytest.approx(alone, rel=1e-5)
