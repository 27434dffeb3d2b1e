"""Host memory per process while fsdp2 loads a model and saves a checkpoint, with 1, 2 and 4 gloo processes on a CPU.

    python -m benchmarks.sharded_loading     # writes benchmarks/results/sharded.{csv,json}

A Llama of random weights (--layers, --hidden) lies in safetensors in bf16. Each process streams its part (ours), or
reads the whole model and then keeps its part (the baseline: what `fully_shard` does with a model that is loaded).
Memory is what a process holds for itself, sampled every 2 ms: anonymous pages and shared memory, above what was there
before. Pages of the files themselves are the system's cache and are given back at need; the peak with them is in
`peak_resident_mb`. Before a figure is kept, the parts put together must be the weights of the files, by their sums.

The checkpoint is that of training every weight with AdamW, weights and both averages in bf16. `held_up_seconds` is what
a step waits for it, `seconds` until it stands; the write goes on beside sleeping, not beside steps.
"""

import argparse
import csv
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp

from stoker.arch import families
from stoker.checkpoint.saver import Saver
from stoker.distributed.fsdp2 import Sharded
from stoker.distributed.ranks import Place, Ranks, join
from stoker.models import native
from stoker.models.streamed import StreamedDecoder
from stoker.tasks.supervised import SupervisedTask

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 2, 4)
WAYS = ("streamed", "whole")
MB = 1_000_000


class Peak:
    """The most memory of this process within its `with` block, above what it had before, in bytes."""

    own = resident = 0

    def __enter__(self) -> "Peak":
        self._stopped, self._start = threading.Event(), _memory()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stopped.wait(0.002):
            self._look()

    def _look(self) -> None:
        own, resident = (now - before for now, before in zip(_memory(), self._start, strict=True))
        self.own, self.resident = max(self.own, own), max(self.resident, resident)


def _memory() -> tuple[int, int]:
    """(anonymous and shared memory, all that is resident), from Linux's own count."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    anonymous, shared, resident = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "VmRSS"))
    return anonymous + shared, resident


def config_of(layers: int, hidden: int) -> dict[str, Any]:
    """Returns the config.json of a Llama of so many layers."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 16_000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
    }


def load(ranks: Ranks, folder: Path, config: dict[str, Any], quantization: str, way: str) -> Sharded:
    """Loads the model over `ranks` in one of the two `WAYS`."""
    spec = families.read(config, "config.json")
    if way == "whole":
        model = native.load(folder, spec, dtype=torch.bfloat16, quantization=quantization)
        fill = None
    else:
        share = {"rank": ranks.rank, "world_size": ranks.world_size, "gather": ranks.gather}
        streamed = StreamedDecoder(folder, spec, dtype=torch.bfloat16, quantization=quantization, **share)
        model, fill = streamed.decoder, streamed.fill
    if quantization != "none":
        model.requires_grad_(False)
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), fill=fill)
    make = (lambda named: torch.optim.AdamW([one for _, one in named])) if quantization == "none" else None
    strategy.prepare(SupervisedTask(model), make)
    return strategy


def held(strategy: Sharded) -> tuple[int, float]:
    """Returns the bytes of the parts that this process holds, and the sum of their values."""
    parts = [parameter.to_local() for parameter in strategy._task.parameters()]
    return sum(part.nbytes for part in parts), sum(part.double().sum().item() for part in parts)


def save(strategy: Sharded, folder: Path) -> dict[str, Any]:
    """Saves a checkpoint after a step whose gradient is zero; returns its figures."""
    for parameter in strategy._trained.values():
        parameter.grad = torch.zeros_like(parameter)
    strategy._optimizer.step()
    strategy._optimizer.zero_grad()
    saver = Saver(folder, rank=strategy.rank, world_size=strategy.world_size, gather=strategy.gather_over_ranks)
    state, started = strategy.shared_state(), time.perf_counter()
    with Peak() as peak:
        saver.begin(
            1, tensors={"weights": state.weights, "optimizer": state.optimizer}, values={"strategy": state.values}
        )
        while not saver.is_written:
            time.sleep(0.01)
        saved = saver.commit()
    seconds = time.perf_counter() - started
    return {
        "checkpoint_mb": saved.num_bytes / MB,
        "held_up_seconds": saved.seconds,
        "seconds": seconds,
        "peak_mb": peak.own / MB,
    }


def work(rank: int, count: int, port: int, job: tuple[str, dict[str, Any], str, str]) -> None:
    """One of `count` processes: loads, saves where every weight is trained, and leaves its figures in the folder."""
    folder, config, quantization, way = job
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = join(Place(rank, count, rank, "torchrun"), kind="cpu", group=True)
    try:
        ranks.sum([0.0])
        started = time.perf_counter()
        with Peak() as peak:
            strategy = load(ranks, Path(folder) / "model", config, quantization, way)
        seconds = time.perf_counter() - started
        num_bytes, total = held(strategy)
        mine = {"peak_mb": peak.own / MB, "peak_resident_mb": peak.resident / MB, "held_mb": num_bytes / MB}
        found: dict[str, Any] = {"ranks": ranks.gather(mine), "sum": ranks.sum([total])[0], "load_seconds": seconds}
        if way == "streamed" and quantization == "none":
            found["checkpoint"] = save(strategy, Path(folder) / "checkpoints")
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found))
        ranks.sum([0.0])
    finally:
        ranks.leave()


def measure(folder: Path, config: dict[str, Any], quantization: str, way: str, count: int) -> dict[str, Any]:
    """Returns the figures of one way with so many processes."""
    import shutil
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    mp.spawn(work, args=(count, port, (str(folder), config, quantization, way)), nprocs=count)
    found = json.loads((folder / "found.json").read_text())
    return {"processes": count, "base": quantization, "way": way, **found}


def main() -> None:
    """Measures everything, prints a line each, and keeps the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--bases", nargs="+", default=["none", "int8"], help="none, int8, nf4 (slow on a CPU), fp8")
    parser.add_argument("--processes", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharded.json")
    options = parser.parse_args()
    config, rows = config_of(options.layers, options.hidden), []
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        spec = families.read(config, "config.json")
        native.save(native.build(spec, dtype=torch.bfloat16), spec, folder / "model", config=config)
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        for quantization in options.bases:
            for count in options.processes:
                pair = [measure(folder, config, quantization, way, count) for way in WAYS]
                sums = [row.pop("sum") for row in pair]
                assert abs(sums[0] - sums[1]) <= 1e-6 * max(1.0, abs(sums[1])), f"other weights: {sums}"
                rows += pair
                for row in pair:
                    print(_line(row), flush=True)
                result = {"model_mb": size / MB, "config": config, "machine": machine, "rows": rows}
                options.out.write_text(json.dumps(result, indent=1) + "\n")
                _write_csv(options.out.with_suffix(".csv"), rows)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    most = {name: max(rank[name] for rank in row["ranks"]) for name in row["ranks"][0]}
    saved = row.get("checkpoint", {})
    figures = {f"most_{name}": value for name, value in most.items()} | {"load_seconds": row["load_seconds"]}
    figures["rank_0_peak_mb"] = row["ranks"][0]["peak_mb"]
    figures |= {f"checkpoint_{name.removeprefix('checkpoint_')}": saved.get(name, "") for name in _SAVED}
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
    return {name: row[name] for name in ("base", "way", "processes")} | rounded


_SAVED = ("checkpoint_mb", "held_up_seconds", "seconds", "peak_mb")


def _line(row: dict[str, Any]) -> str:
    flat = _flat(row)
    text = f"{flat['base']:<5} {flat['way']:<9} {flat['processes']} processes: peak {flat['most_peak_mb']:.0f} MB each"
    text += f" (rank 0: {flat['rank_0_peak_mb']:.0f}), {flat['most_held_mb']:.0f} MB kept, {flat['load_seconds']:.1f} s"
    if flat["checkpoint_mb"]:
        text += f"; checkpoint {flat['checkpoint_mb']:.0f} MB, steps wait {flat['checkpoint_held_up_seconds']:.2f} s"
        text += f" of {flat['checkpoint_seconds']:.2f} s"
    return text


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(_flat(rows[0])))
        writer.writeheader()
        writer.writerows(map(_flat, rows))


if __name__ == "__main__":
    main()
