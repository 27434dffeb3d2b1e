"""Collectives between the processes of one host, a GPU each, or over the CPU where there is none.

Given is NCCL's "bus bandwidth": the bytes on the busiest link a second, the same for any number of ranks if links alone
limit it (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): of S bytes over n ranks, 2 (n - 1) / n S for an all-reduce
and (n - 1) / n S for an all-gather.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stoker.errors import ConfigError, TrainingError

_SMALL = 1024
_REPEATS = {"cuda": 10, "cpu": 2}


def measure(num_processes: int, num_bytes: int, *, say: Callable[[str], None]) -> dict[str, float]:
    """Returns `bus_bytes_per_second`, the lower of both collectives' for `num_bytes`, and `latency_seconds` of a small
    all-reduce.

    Raises:
        ConfigError: there are fewer GPUs. TrainingError: the processes failed.
    """
    import torch
    import torch.multiprocessing as spawn

    on_gpu = torch.cuda.is_available()
    if on_gpu and torch.cuda.device_count() < num_processes:
        raise ConfigError(
            f"--gpus {num_processes} asks for more GPUs than the {torch.cuda.device_count()} here.", fix="Ask for less."
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn.spawn(_rank, args=(num_processes, num_bytes, folder), nprocs=num_processes)  # pyrefly: ignore
        except Exception as error:  # a child's own error, or its death, comes as one of several classes
            raise TrainingError(f"collectives over {num_processes} processes failed: {error}") from error
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    say(
        f"  collectives over {num_processes}: {found['bus_bytes_per_second'] / 1e9:,.1f} GB/s on the busiest link, "
        f"{found['latency_seconds'] * 1e6:,.0f} us for a small one"
    )
    return found


def _rank(rank: int, world: int, num_bytes: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=store, rank=rank, world_size=world)
    whole = torch.zeros(num_bytes // 4 // world * world, device=device)
    part = torch.zeros(whole.numel() // world, device=device)
    small = torch.zeros(_SMALL // 4, device=device)
    moved = whole.nbytes * (world - 1) / world
    reduced = 2 * moved / _seconds(lambda: dist.all_reduce(whole), device)
    gathered = moved / _seconds(lambda: dist.all_gather(list(whole.chunk(world)), part), device)
    latency = _seconds(lambda: dist.all_reduce(small), device)
    if rank == 0:
        found = {"bus_bytes_per_second": min(reduced, gathered), "latency_seconds": latency}
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(run: Callable[[], Any], device: Any) -> float:
    """Median seconds of a call over three batches of them."""
    import torch
    import torch.distributed as dist

    repeats = _REPEATS[device.type]
    run()
    found = []
    for _ in range(3):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - start) / repeats)
    return statistics.median(found)
