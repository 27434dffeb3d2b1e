"""Two GPUs against one, over NCCL, as a user starts them; `on_gpus.sh` runs it. `--cpu` tries it out with gloo.

Each check is a run of a tiny model for twenty steps. Those of one GPU are the reference: losses must be theirs to the
rounding of fp32. Checks that the time no longer allows are named as left out; a run that takes too long is ended.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

BUDGET_SECONDS = 225.0
STEPS = 20
TOLERANCE = 1e-3  # fp32 sums in other orders, over twenty steps
CPU = "--cpu" in sys.argv
STARTED = time.monotonic()

RUN = """
model: {base: "builtin:tiny-llama"}
adapter: {rank: 8, alpha: 16}
data:
  train: [{path: "builtin:fine-tuning"}]
  sequence_length: 128
  packing: true
train: {steps: 20, batch_size: 8, learning_rate: 1.0e-3, seed: 7}
engine: {precision: fp32, device: DEVICE}
output: {folder: run, save_every_steps: 5, keep_last: 10, trackers: []}
"""

# A signal makes the main thread of a process hang wherever it is.
HANGS = """
import os, signal, time

def hangs_here(number, frame):
    time.sleep(600)

if os.environ.get("RANK") is not None:
    signal.signal(signal.SIGUSR1, hangs_here)
"""


def left():
    return BUDGET_SECONDS - (time.monotonic() - STARTED)


class Run:
    """A run in a folder below `place`, as a process; `gpu`: the one that it sees alone."""

    def __init__(self, place, name, *options, gpu=None):
        self.name, self.folder = name, place / name
        self.folder.mkdir(exist_ok=True)
        self.metrics = self.folder / "run" / "metrics.jsonl"
        (self.folder / "run.yaml").write_text(RUN.replace("DEVICE", "cpu" if CPU else "cuda"))
        (self.folder / "sitecustomize.py").write_text(HANGS)
        environment = os.environ | {"PYTHONPATH": f"{self.folder}:{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        command = [sys.executable, "-m", "stoker.cli.main", "train", "run.yaml", "--set", f"data.cache_folder={place}"]
        self.log = (place / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=self.folder,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.began = time.monotonic()

    def wait_for_steps(self, count, seconds=90.0):
        until = time.monotonic() + min(seconds, max(left(), 0.0))
        while self.process.poll() is None and time.monotonic() < until and len(self.losses()) < count:
            time.sleep(0.05)

    def child(self, rank):
        children = psutil.Process(self.process.pid).children()
        return next(one for one in children if one.environ().get("RANK") == str(rank))

    def end(self, code=0, seconds=90.0):
        """Waits for the end and raises where it is another than this; what is left of the run is killed."""
        try:
            self.process.wait(timeout=max(1.0, min(seconds, left())))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} took more than {time.monotonic() - self.began:.0f} s") from None
        finally:
            family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
            for one in [*family, self.process]:
                one.kill()
            self.log.close()
        if self.process.returncode != code:
            tail = Path(self.log.name).read_text().strip().splitlines()[-6:]
            raise AssertionError(f"{self.name} ended with {self.process.returncode}: " + " | ".join(tail))
        return self

    def losses(self):
        """The loss of each step, the last time that it was taken."""
        try:
            rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        except (OSError, ValueError):
            return {}
        return {row["step"]: row["loss"] for row in rows if "loss" in row}


def compare(run, reference):
    found, expected = run.losses(), reference.losses()
    assert len(found) == len(expected) == STEPS, f"{run.name}: {len(found)} steps, {reference.name}: {len(expected)}"
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst < TOLERANCE, f"{run.name}: losses differ from {reference.name}'s by up to {worst:.2e}"
    return f"losses differ from one GPU's by at most {worst:.1e}"


TWO = ("--gpus", "2")
FSDP2 = ("--set", "engine.strategy=fsdp2")
DDP = ("--set", "engine.strategy=ddp")
NF4 = ("--set", "model.quantization=nf4")


class Checks:
    """All checks, in their order: the first ones make what later ones compare with."""

    def __init__(self, place):
        self.place, self.runs = place, {}

    def run(self, name, *options, **more):
        self.runs[name] = Run(self.place, name, *options, **more)
        return self.runs[name]

    def one_gpu(self):
        """Both at once, each on a GPU of its own."""
        both = [self.run("one", "--gpus", "1", gpu=0), self.run("nf4-one", "--gpus", "1", *NF4, gpu=1)]
        for run in both:
            run.end()
        losses = both[0].losses()
        assert losses[STEPS] < losses[1], "the loss does not fall"
        return f"loss from {losses[1]:.3f} to {losses[STEPS]:.3f}"

    def ddp(self):
        return compare(self.run("ddp", *TWO, *DDP).end(), self.runs["one"])

    def fsdp2(self):
        return compare(self.run("fsdp2", *TWO, *FSDP2).end(), self.runs["one"])

    def nf4_fsdp2(self):
        return compare(self.run("nf4-fsdp2", *TWO, *FSDP2, *NF4).end(), self.runs["nf4-one"])

    def resumed_on_one(self):
        """What two GPUs have saved after ten steps goes on on one, of ddp and of fsdp2, on a GPU each."""
        both = []
        for gpu, name in enumerate(("ddp", "fsdp2")):
            copy = self.place / f"{name}-resumed"
            shutil.copytree(self.runs[name].folder, copy, dirs_exist_ok=True)
            for saved in (copy / "run" / "checkpoints").glob("step-*"):
                if int(saved.name[5:11]) > 10:
                    shutil.rmtree(saved)
            lines = (copy / "run" / "metrics.jsonl").read_text().splitlines()
            kept = [line for line in lines if json.loads(line).get("step", 0) <= 10]
            (copy / "run" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
            strategy = ("--set", "engine.strategy=single")
            both.append(self.run(copy.name, "--gpus", "1", "--resume", *strategy, gpu=gpu))
        return "; ".join(compare(run.end(), self.runs["one"]) for run in both)

    def restarted(self):
        run = self.run("restarted", *TWO, *DDP, "--max-restarts", "1")
        run.wait_for_steps(8)
        run.child(1).send_signal(signal.SIGKILL)
        said = compare(run.end(), self.runs["one"])
        again = [line for line in Path(run.log.name).read_text().splitlines() if "Resuming from" in line]
        assert len(again) == 1, "it was not killed, or did not go on from a checkpoint"
        return f"{said}; {again[0].strip()}"

    def hang(self):
        run = self.run("hang", *TWO, *DDP, "--set", "engine.hang_timeout=12", "--set", "train.steps=2000")
        run.wait_for_steps(8)
        run.child(1).send_signal(signal.SIGUSR1)
        began = time.monotonic()
        run.end(code=1)
        said = Path(run.log.name).read_text()
        assert "error: rank 1 (" in said, said[-600:]
        assert "hangs_here" in (run.folder / "run" / "hang" / "rank-1.txt").read_text()
        return f"named after {time.monotonic() - began:.0f} s: " + said[said.index("error: rank 1") :].split(". ")[0]


def main():
    out = Path(next((one for one in sys.argv[1:] if not one.startswith("--")), "/tmp/stoker-on-gpus")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="stoker-on-gpus-"))
    checks, found = Checks(place), {}
    names = ("one_gpu", "ddp", "fsdp2", "nf4_fsdp2", "resumed_on_one", "restarted", "hang")
    for name in names:
        began = time.monotonic()
        if left() < 25.0:
            found[name] = {"result": "left out", "said": "no time was left"}
        else:
            try:
                found[name] = {"result": "passed", "said": getattr(checks, name)()}
            except Exception as error:  # noqa: BLE001 - the other checks still say something
                found[name] = {"result": "FAILED", "said": f"{type(error).__name__}: {error}"}
        found[name]["seconds"] = round(time.monotonic() - began, 1)
        one = found[name]
        print(f"{name:<15} {one['result']:<8} {one['seconds']:>5.1f} s  {one['said']}", flush=True)
    for run in checks.runs.values():
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
        for file in (run.metrics, place / f"{run.name}.log"):
            if file.is_file():
                shutil.copy(file, out / f"{run.name}{file.suffix}")
    (out / "summary.json").write_text(json.dumps(found, indent=1))
    shutil.rmtree(place, ignore_errors=True)
    failed = [name for name, one in found.items() if one["result"] != "passed"]
    print(f"{len(names) - len(failed)} of {len(names)} passed in {time.monotonic() - STARTED:.0f} s; see {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
