"""`stoker train` over changing counts of GPUs, and with a process that dies, held against an unbroken run's losses."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scaling import launch

_STEPS = 12
_SAVE_EVERY = 4
_ROWS = 32
_POLL_SECONDS = 0.02
_TOLERANCE = 0.02
"""How far a loss may be from the unbroken run's: over other counts of ranks sums round otherwise in bf16, and that
grows from step to step. Over the same count (`_SAME`) only kernels that add in no fixed order differ."""
_SAME = 1e-4

Facts = dict[str, Any]


def resumed(model: str, gpus: int, *, timeout: float) -> Facts:
    """Trains to the end on `gpus`; then once more, changing the count at every checkpoint: all, half, all of them."""
    with tempfile.TemporaryDirectory() as place:
        runs = _Runs(Path(place), model, timeout)
        whole = runs.train("whole", gpus)
        half = max(1, gpus // 2)
        for number, count in enumerate((gpus, half, gpus), start=1):
            runs.train("parts", count, "--resume", f"train.steps={number * _SAVE_EVERY}")
        what = f"{gpus} -> {half} -> {gpus} GPUs"
        return runs.facts(what, gpus, whole, runs.losses("parts"), tolerance=_TOLERANCE)


def killed(model: str, gpus: int, *, timeout: float) -> Facts:
    """Trains to the end; then once more with `--max-restarts 1`, and a process that is killed on the way."""
    with tempfile.TemporaryDirectory() as place:
        runs = _Runs(Path(place), model, timeout)
        whole = runs.train("whole", gpus)
        runs.train("broken", gpus, "--max-restarts", "1", during=_kill_one)
        what = f"one of {gpus} processes killed after step {_SAVE_EVERY + 1}, started again"
        return runs.facts(what, gpus, whole, runs.losses("broken"), tolerance=_SAME)


def _kill_one(process: subprocess.Popen, metrics: Path) -> None:
    """Kills a process of the run once it is past its first checkpoint."""
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > _SAVE_EVERY):
        time.sleep(_POLL_SECONDS)
    workers = psutil.Process(process.pid).children()
    if len(workers) > 1:
        workers[-1].send_signal(signal.SIGKILL)


class _Runs:
    """Runs of one YAML in a folder; `error` is the first thing that went wrong."""

    def __init__(self, place: Path, model: str, timeout: float) -> None:
        self._place, self._end = place, time.monotonic() + timeout
        self.error = ""
        self.seconds: dict[str, float] = {}
        draw = random.Random(0)
        words = ["alpha", "beta", "gamma", "delta", "epsilon"]
        rows = [{"text": " ".join(draw.choices(words, k=200))} for _ in range(_ROWS)]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._values = {
            "model": {"base": model},
            "adapter": {"rank": 8, "alpha": 16},
            "task": {"kind": "pretrain"},
            "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 512, "cache_folder": "cache"},
            "train": {"steps": _STEPS, "batch_size": 8, "learning_rate": 1e-3, "schedule": {"kind": "constant"}},
            "output": {"folder": "run", "save_every_steps": _SAVE_EVERY, "trackers": []},
        }
        (place / "run.yaml").write_text(json.dumps(self._values))  # JSON is YAML

    def train(
        self,
        name: str,
        gpus: int,
        *options: str,
        during: Callable[[subprocess.Popen, Path], None] | None = None,
    ) -> list[float]:
        """Runs `stoker train` on `gpus`; options with `=` are settings. Returns the losses of the run's folder."""
        if self.error:
            return []
        command = [sys.executable, "-m", "stoker.cli.main", "train", "run.yaml", "--set", f"output.folder={name}"]
        command += ["--gpus", str(gpus)]
        for option in options:
            command += ["--set", option] if "=" in option else [option]
        if not (self._place / name).exists() and "--resume" in command:
            command.remove("--resume")
        environment = {"NCCL_NVLS_ENABLE": "0", "HF_HUB_OFFLINE": "1", "COLUMNS": "160", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(place or ".").resolve()) for place in sys.path)
        start = time.monotonic()
        log = self._place / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=self._place,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                if during is not None:
                    during(process, self._place / name / "metrics.jsonl")
                process.wait(max(1.0, self._end - time.monotonic()))
            except subprocess.TimeoutExpired:
                launch.end(process)
                self.error = f"{name} on {gpus} did not end in time"
        self.seconds[f"{name} on {gpus}, run {len(self.seconds) + 1}"] = time.monotonic() - start
        if process.returncode and not self.error:
            lines = log.read_text(errors="replace").splitlines()
            print("\n".join("  | " + line[:220] for line in lines[-30:]), flush=True)
            self.error = f"{name} on {gpus}: exit code {process.returncode}: {launch.cause(lines)}"
        return self.losses(name)

    def losses(self, name: str) -> list[float]:
        """Returns the loss of each step; of a step that was taken twice, the later one's."""
        path = self._place / name / "metrics.jsonl"
        rows = map(json.loads, path.read_text().splitlines() if path.is_file() else ())
        return list({row["step"]: row["loss"] for row in rows if "loss" in row}.values())

    def facts(self, what: str, gpus: int, whole: list[float], found: list[float], *, tolerance: float) -> Facts:
        """Returns what is kept of a comparison."""
        error = self.error
        difference = max((abs(a - b) for a, b in zip(whole, found, strict=False)), default=0.0)
        if not error and len(found) != len(whole):
            error = f"{what}: {len(found)} steps in place of {len(whole)}"
        if not error and not difference <= tolerance:
            error = f"{what}: a loss is {difference:.1e} from the unbroken run's"
        what = f"{what}: losses within {difference:.1e} of the unbroken run's"
        return {
            "what": what,
            "error": error,
            "num_gpus": gpus,
            "losses": found,
            "unbroken_losses": whole,
            "loss_difference": difference,
            "seconds": self.seconds,
        }
