"""Collectives of PyTorch over the GPUs of one host, by size: what the plan's catalogue knows of links.

Started through torchrun by `python -m benchmarks.scaling collectives`: `collectives.py RESULT.json [MAX_MIB]`. What
is given is NCCL's "bus bandwidth": bytes on the busiest link a second, the same for any number of ranks if links alone
limit it (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): of S bytes over n ranks, 2 (n - 1) / n S for all-reduce and
(n - 1) / n S for the others, S being the whole on one rank.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SMALLEST = 1024
_REPEATS = 20
_BATCHES = 3


def main(result_path: str, max_mib: str = "256") -> None:
    """Measures every collective by size; the first rank writes a list of rows."""
    on_gpu = torch.cuda.is_available()
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rows = []
    size = _SMALLEST
    while size <= int(max_mib) * 2**20:
        for name in COLLECTIVES:
            rows.append(measure(name, size, device))
        size *= 4
    if rank == 0:
        facts = {
            "num_gpus": dist.get_world_size(),
            "device": torch.cuda.get_device_name() if on_gpu else "CPU (gloo)",
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "none",
            "rows": rows,
            "summary": summary(rows),
        }
        Path(result_path).write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def _all_reduce(whole: Tensor, part: Tensor) -> None:
    del part
    dist.all_reduce(whole)


def _all_gather(whole: Tensor, part: Tensor) -> None:
    dist.all_gather_into_tensor(whole, part)


def _reduce_scatter(whole: Tensor, part: Tensor) -> None:
    dist.reduce_scatter_tensor(part, whole)


def _all_to_all(whole: Tensor, part: Tensor) -> None:
    del part
    dist.all_to_all_single(torch.empty_like(whole), whole)


COLLECTIVES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


def measure(name: str, size: int, device: torch.device) -> dict[str, Any]:
    """Returns the microseconds of one call on `size` bytes and the bus bandwidth, the median of a few batches."""
    world, run = dist.get_world_size(), COLLECTIVES[name]
    whole = torch.zeros(size // 2 // world * world, dtype=torch.bfloat16, device=device)
    part = torch.zeros(whole.numel() // world, dtype=whole.dtype, device=device)
    repeats = _REPEATS if device.type == "cuda" else 2
    run(whole, part)
    found = []
    for _ in range(_BATCHES):
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run(whole, part)
        _wait(device)
        found.append((time.perf_counter() - start) / repeats)
    seconds = statistics.median(found)
    return {
        "collective": name,
        "bytes": whole.nbytes,
        "microseconds": seconds * 1e6,
        "bus_bytes_per_second": moved(name, whole.nbytes, world) / seconds,
    }


def moved(name: str, size: int, world: int) -> float:
    """Returns the bytes on the busiest link of a collective whose whole tensor has `size` bytes."""
    return size * (world - 1) / world * (2 if name == "all_reduce" else 1)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns for each collective the latency, that of the smallest size, and the highest bandwidth."""
    return {
        name: {
            "latency_microseconds": min(row["microseconds"] for row in rows if row["collective"] == name),
            "bus_bytes_per_second": max(row["bus_bytes_per_second"] for row in rows if row["collective"] == name),
        }
        for name in COLLECTIVES
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
