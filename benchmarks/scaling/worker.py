"""One process of a measurement, started by `python -m benchmarks.scaling`: `worker.py JOB.json RESULT.json`."""

import json
import sys
from pathlib import Path

import torch
from rich.console import Console

if not __package__:  # run as a file: Python then looks in the file's own folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.scaling.communication import watched
from stoker.compose import parallel
from stoker.compose.bench.over_ranks import measure
from stoker.compose.bench.peers import as_values
from stoker.compose.run_folder import versions
from stoker.config.load import parse
from stoker.distributed.ranks import end_process


def main(job_path: str, result_path: str) -> None:
    """Runs the job with the other ranks; the first one writes what was measured."""
    job = json.loads(Path(job_path).read_text())
    config = parse(job["config"])
    ranks = parallel.join(config)
    try:
        console = Console(quiet=not ranks.is_first)
        run = measure(config, ranks, steps=job["steps"], console=console, look=watched)
        on_gpu = run.device.type == "cuda"
        facts = {
            **as_values(run.measured),
            "num_gpus": ranks.world_size,
            "device": torch.cuda.get_device_name() if on_gpu else run.plan.device_name,
            "strategy": run.plan.strategy,
            "recompute": run.plan.recompute,
            "predicted_bytes": run.plan.memory.total,
            "communication": run.found,
            "versions": versions() | {"nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "none"},
        }
        if ranks.is_first:
            Path(result_path).write_text(json.dumps(facts))
        ranks.sum([0.0])  # nobody leaves before it is written
    finally:
        ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # A process group that DDP is the last to hold may wait, at the interpreter's end, for a thread of its own for good.
    end_process(0)
