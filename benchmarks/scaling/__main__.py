"""Measures training on 1, 2, ... GPUs of this machine, cell by cell, beside Accelerate with FSDP2 and PEFT.

    python -m benchmarks.scaling lora_8b full_1b nf4_8b context_32k --gpus 1,2 --budget 450
    python -m benchmarks.scaling collectives resume kill --gpus 2
    python -m benchmarks.scaling alone --gpus 1 # what each strategy costs where there is nothing to share
    python -m benchmarks.scaling tiny tiny_full tiny_context collectives resume kill --gpus 1,2 --steps 2   # on a CPU

Every count of GPUs takes the same steps on the same rows: losses are held against those of the smallest count. Runs go
through the plan, the strategies and the step of `stoker train`; `resume` and `kill` run the command itself. The share
of communication is that of one more step under PyTorch's profiler. Appends to benchmarks/results/scaling.{json,csv}
after every run, so that one that is cut off loses itself alone; what would start too late for `--budget` is left out
and named. Exit code 1 if anything failed or was left out.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: Python then looks in the file's own folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.scaling import launch, recovery, results
from benchmarks.scaling.cells import ALONE, CELLS, Cell

OTHERS = ("collectives", "resume", "kill", "alone")
_LEAST_SECONDS = 25.0
"""What a run takes at least: with less time left, none is started."""

Facts = dict[str, Any]


def main() -> int:
    """Measures what was asked for; returns the exit code."""
    options = _options()
    bench = Bench(options)
    for name in options.cells:
        if name == "collectives":
            bench.collectives()
        elif name == "alone":
            bench.alone()
        elif name in OTHERS:
            bench.recovery(name)
        else:
            bench.cell(name)
    for name in options.cells:  # last, so that the time goes to our own cells first
        if name in CELLS and CELLS[name].peer and not options.no_peers:
            bench.peer(name)
    print(results.table(bench.found), flush=True)
    for sentence in bench.failed:
        print(f"no result: {sentence}", flush=True)
    return 1 if bench.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join((*CELLS, *OTHERS))
    parser.add_argument("cells", nargs="+", metavar="CELL", help=f"of {known}")
    parser.add_argument("--gpus", default="1,2", help="counts, such as 1,2,4,8 (on a CPU: processes)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one run")
    parser.add_argument("--no-peers", action="store_true", help="leave Accelerate out")
    parser.add_argument("--models", type=Path, help="folder for the models that are made")
    parser.add_argument("--commit", help="commit to note, where there is no git")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder to append to")
    options = parser.parse_args()
    if unknown := set(options.cells) - {*CELLS, *OTHERS}:
        parser.error(f"no cell {', '.join(sorted(unknown))}; there are {known}")
    options.counts = sorted({int(count) for count in options.gpus.split(",")})
    return options


class Bench:
    """The runs of one call: what was `found`, and sentences on what `failed`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.budget
        self.found: list[Facts] = []
        self.failed: list[str] = []
        self._last: dict[str, tuple[Facts, str]] = {}
        """Of each cell, the run on the most GPUs and the model's folder."""

    def cell(self, name: str) -> None:
        """Runs a cell on every count of GPUs."""
        cell, counts = CELLS[name], self._counts(name)
        if not counts:
            self.failed.append(f"{name}: it needs {cell.min_gpus} GPUs")
            return
        with tempfile.TemporaryDirectory() as place:
            folder = self._model(name, cell)
            if folder is None:
                return
            first: Facts | None = None
            for count in counts:
                facts = self._ours(name, cell, count, counts, folder=folder, place=Path(place))
                if facts is not None:
                    first = first or facts
                    self._last[name] = facts, folder
                    self._keep(results.compared(facts, first))

    def alone(self) -> None:
        """Runs every strategy on one GPU, on the same rows, as the plan would and by its own engine."""
        name = "lora_8b" if results.has_gpu() else "tiny"
        folder = self._model(name, CELLS[name])
        if folder is None:
            return
        first: Facts | None = None
        with tempfile.TemporaryDirectory() as place:
            for which in ALONE:
                facts = self._ours(name, CELLS[name], 1, [1], folder=folder, place=Path(place), alone=which)
                if facts is not None:
                    facts |= {"cell": f"alone_{which}"}
                    first = first or facts
                    self._keep(results.beside_single(results.compared(facts, first), first))

    def _counts(self, name: str) -> list[int]:
        return [count for count in self.options.counts if count >= CELLS[name].min_gpus]

    def _model(self, name: str, cell: Cell) -> str | None:
        """Makes the cell's model, in a process of its own that gives the GPU's memory back; returns its folder."""
        with tempfile.TemporaryDirectory() as place:
            output = Path(place) / "folder"
            arguments = [cell.model, str(output), *([str(self.options.models)] if self.options.models else [])]
            if not self._run(f"{name}: its model", "benchmarks.scaling.make_model", arguments, processes=1):
                return None
            return output.read_text()

    def _ours(
        self,
        name: str,
        cell: Cell,
        count: int,
        counts: list[int],
        *,
        folder: str,
        place: Path,
        alone: str | None = None,
    ) -> Facts | None:
        """`alone`: which of `ALONE` it is, if one."""
        job, output = place / f"{count}.json", place / f"{count}-{alone}-result.json"
        strategy, changes = ALONE[alone] if alone else (None, None)
        config = cell.config(count, counts, folder=folder, strategy=strategy, engine_changes=changes)
        job.write_text(json.dumps({"config": config, "steps": self.options.steps}))
        arguments = [str(job), str(output)]
        title = f"{name} on {count}" + (f", {alone}" if alone else "")
        if not self._run(title, "benchmarks.scaling.worker", arguments, processes=count):
            return None
        return {"cell": name, "kind": "training", "tokens": f"{cell.batch_size(counts)} x {cell.length}"} | json.loads(
            output.read_text()
        )

    def peer(self, name: str) -> None:
        """Runs Accelerate on the same rows as the cell's run on the most GPUs."""
        if name not in self._last:
            return
        facts, folder = self._last[name]
        if facts["num_gpus"] == max(self._counts(name)):
            with tempfile.TemporaryDirectory() as place:
                self._peer(name, CELLS[name], self._counts(name), facts, folder=folder, place=Path(place))

    def _peer(self, name: str, cell: Cell, counts: list[int], ours: Facts, *, folder: str, place: Path) -> None:
        """Runs it, with activations checkpointed if our layers computed again, or else if it fails without."""
        job, output = place / "peer.json", place / "peer-result.json"
        values = results.peer_job(cell, counts, folder=folder, steps=self.options.steps, place=place)
        count = max(counts)
        title = f"{name} on {count}, Accelerate"
        for checkpointing in sorted({ours["recompute"] != "keep all", True}):
            job.write_text(json.dumps(values | {"checkpointing": checkpointing}))
            arguments = [str(job), str(output)]
            environment = {"ACCELERATE_USE_FSDP": "true"}
            if self._run(
                title, "benchmarks.scaling.peer", arguments, processes=count, environment=environment, again=True
            ):
                facts = {"cell": name, "kind": "peer", "num_gpus": count, "device": ours["device"]}
                self._keep(results.beside(facts | json.loads(output.read_text()), ours))
                return
            print(f"{title}: once more, with activations checkpointed" if not checkpointing else "", flush=True)
        self.failed.append(f"{title}: {self.reason}")

    def collectives(self) -> None:
        """Measures collectives on the largest count of GPUs."""
        count = max(self.options.counts)
        with tempfile.TemporaryDirectory() as place:
            output = Path(place) / "result.json"
            arguments = [str(output), *(() if results.has_gpu() else ("1",))]
            if self._run(f"collectives on {count}", "benchmarks.scaling.collectives", arguments, processes=count):
                self._keep({"cell": "collectives", "kind": "collectives"} | json.loads(output.read_text()))

    def recovery(self, name: str) -> None:
        """Runs `stoker train` over changing counts, or with a process that dies."""
        work = recovery.resumed if name == "resume" else recovery.killed
        start = time.monotonic()
        left = min(self.end - start, 3 * self.options.timeout)
        if left < _LEAST_SECONDS:
            self.failed.append(f"{name}: the time is used up")
            return
        folder = self._model(name, CELLS["full_1b" if results.has_gpu() else "tiny"])
        if folder is None:
            return
        print(f"=== {name}", flush=True)
        facts = work(folder, max(self.options.counts), timeout=left)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        if facts["error"]:
            self.failed.append(f"{name}: {facts['error']}")
        self._keep({"cell": name, "kind": "recovery"} | facts)

    def _run(
        self,
        title: str,
        module: str,
        arguments: list[str],
        *,
        processes: int,
        environment: dict[str, str] | None = None,
        again: bool = False,
    ) -> bool:
        """Whether a run succeeded within the time; `again`: its caller says so if not."""
        start = time.monotonic()
        left = self.end - start
        self.reason = "the time is used up"
        if left >= _LEAST_SECONDS:
            print(f"=== {title}", flush=True)
            timeout = min(left, self.options.timeout)
            self.reason = launch.run(module, arguments, processes=processes, timeout=timeout, environment=environment)
            print(f"{title}: {self.reason or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
        if self.reason and not again:
            self.failed.append(f"{title}: {self.reason}")
        return not self.reason

    def _keep(self, facts: Facts) -> None:
        facts = results.dated(facts, commit=self.options.commit)
        self.found.append(facts)
        results.append(facts, self.options.results)
        print(results.line(facts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
