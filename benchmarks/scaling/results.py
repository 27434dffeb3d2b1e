"""What was measured: compared with fewer GPUs and with the peer, kept as JSON and CSV, shown as lines."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.cells import Cell
from stoker.compose.bench import report
from stoker.compose.run_folder import now

FOLDER = Path(__file__).parents[1] / "results"
COLUMNS = (
    "cell",
    "kind",
    "num_gpus",
    "strategy",
    "tokens_per_second_per_gpu",
    "efficiency",
    "peak_bytes",
    "predicted_bytes",
    "memory_of_plan",
    "step_seconds",
    "collectives_share",
    "exposed_share",
    "loss_difference",
    "speed_of_peer",
    "device",
    "commit",
    "date",
)
_PEER_LOSS = 0.01
"""How far a peer's first loss may be from ours: bf16 in another order."""

Facts = dict[str, Any]


def has_gpu() -> bool:
    """Whether there is a GPU to measure on."""
    import torch

    return torch.cuda.is_available()


def compared(facts: Facts, first: Facts) -> Facts:
    """Adds speed per GPU, scaling efficiency and the largest difference of a loss, from those of the fewest GPUs."""
    speed = facts["tokens_per_second"] / facts["num_gpus"]
    before = first["tokens_per_second"] / first["num_gpus"]
    differences = [abs(a - b) for a, b in zip(facts["losses"], first["losses"], strict=True)]
    times = facts["communication"]
    milliseconds = facts["step_seconds"] * 1e3
    return facts | {
        "tokens_per_second_per_gpu": speed,
        "compared_with_gpus": first["num_gpus"],
        "efficiency": speed / before,
        "loss_difference": max(differences),
        "memory_of_plan": facts["peak_bytes"] / facts["predicted_bytes"],
        "collectives_share": None if times is None else times["collectives"] / milliseconds,
        "exposed_share": None if times is None else times["exposed"] / milliseconds,
    }


def beside_single(facts: Facts, single: Facts) -> Facts:
    """Adds what a strategy costs where it has nothing to share: of a step's time, and bytes, more than `single`'s.

    `single` may itself be missing, where the first run was another's: then there is nothing to add.
    """
    if single["strategy"] != "single":
        return facts
    return facts | {
        "cost_of_strategy": facts["step_seconds"] / single["step_seconds"] - 1.0,
        "bytes_of_strategy": facts["peak_bytes"] - single["peak_bytes"],
    }


def beside(facts: Facts, ours: Facts) -> Facts:
    """Adds the ratio of our speed and memory to the peer's, or why the peer did not do the same job."""
    facts = facts | {"tokens_per_second_per_gpu": facts["tokens_per_second"] / facts["num_gpus"]}
    mine, theirs = ours["losses"][0], facts["losses"][0]
    if not math.isclose(mine, theirs, rel_tol=_PEER_LOSS):
        return facts | {"error": f"its first loss is {theirs:.4f}, ours {mine:.4f}: not the same job"}
    return facts | {
        "loss_difference": abs(mine - theirs),
        "speed_of_peer": ours["tokens_per_second"] / facts["tokens_per_second"],
        "memory_of_peer": ours["peak_bytes"] / facts["peak_bytes"] if facts["peak_bytes"] else None,
    }


def peer_job(cell: Cell, counts: Sequence[int], *, folder: str, steps: int, place: Path) -> Facts:
    """Writes the rows of every step into `place`; returns the rest of a peer's job."""
    from stoker.compose.bench import rows
    from stoker.compose.bench.measure import WARMUP_STEPS
    from stoker.compose.data import loader
    from stoker.compose.model import open_base
    from stoker.config.load import parse

    count = max(counts)
    config = parse(cell.config(count, counts, folder=folder))
    data = rows.random_data(config, open_base(folder).spec.vocab_size, steps=WARMUP_STEPS + steps)
    batches = loader(config, data.train, micro_batch_size=config.train.batch_size, pad_id=0, mixed=True)
    whole = [batches.step(number)[0] for number in range(WARMUP_STEPS + steps)]
    arrays = {name: np.stack([getattr(one, name).numpy() for one in whole]) for name in ("input_ids", "targets")}
    np.savez(place / "rows.npz", **arrays)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = (
        {"rank": config.adapter.rank, "alpha": config.adapter.alpha, "targets": targets} if config.adapter else None
    )
    return {
        "model": folder,
        "rows": str(place / "rows.npz"),
        "adapter": adapter,
        "micro_batch_size": cell.rows,
        "tokens_per_step": whole[0].num_tokens,
        "warmup_steps": WARMUP_STEPS,
        "learning_rate": config.train.learning_rate,
        "seed": config.train.seed,
    }


def dated(facts: Facts, *, commit: str | None) -> Facts:
    """Adds when, and at which commit."""
    return facts | {"commit": commit or report.commit(), "date": now()}


def append(facts: Facts, folder: Path) -> None:
    """Adds a run to scaling.json, and its line to scaling.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    path, table = folder / "scaling.json", folder / "scaling.csv"
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    path.write_text(json.dumps({"runs": [*runs, facts]}, indent=1) + "\n")
    is_new = not table.is_file()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow({name: facts.get(name) for name in COLUMNS})


def line(facts: Facts) -> str:
    """Returns a run as a line for people."""
    if facts["kind"] == "collectives":
        each = (
            f"{name} {one['latency_microseconds']:.0f} us, {one['bus_bytes_per_second'] / 1e9:.0f} GB/s"
            for name, one in facts["summary"].items()
        )
        return f"  collectives on {facts['num_gpus']}: " + "; ".join(each)
    if facts["kind"] == "recovery":
        return f"  {facts['cell']}: {facts['error'] or facts['what']}"
    parts = [f"{facts['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU", f"{facts['peak_bytes'] / 2**30:.1f} GiB"]
    parts += [f"{name} {facts[key]:.1%}" for name, key in _SHARES if facts.get(key) is not None]
    if facts.get("loss_difference") is not None:
        parts.append(f"losses within {facts['loss_difference']:.1e}")
    if facts.get("cost_of_strategy") is not None:
        more = facts["bytes_of_strategy"] / 2**20
        parts.append(f"{facts['cost_of_strategy']:+.1%} of single's time, {more:+,.0f} MiB")
    if facts.get("speed_of_peer"):
        parts.append(f"Stoker is {facts['speed_of_peer']:.2f} x as fast")
    if facts.get("error"):
        parts.append(facts["error"])
    who = "Accelerate" if facts["kind"] == "peer" else facts["strategy"]
    return f"  {facts['cell']} on {facts['num_gpus']}, {who}: " + ", ".join(parts)


_SHARES = (("efficiency", "efficiency"), ("collectives", "collectives_share"), ("exposed", "exposed_share"))


def table(found: Sequence[Facts]) -> str:
    """Returns all runs, a line each."""
    return "\n".join(["", *map(line, found)])
