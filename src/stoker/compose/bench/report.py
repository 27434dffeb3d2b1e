"""A benchmark's results: a table for people, JSON and CSV for everything else."""

import csv
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from stoker.compose.bench.floor import Floor
from stoker.compose.bench.peers import as_values
from stoker.compose.bench.result import Measured
from stoker.errors import OutputError
from stoker.plan.memory import GIB

Facts = dict[str, Any]
_ELSEWHERE = ("losses", "notices", "versions", "kernels")
"""What a measurement holds that is no column of the results."""


def rows(measured: Sequence[Measured], floor: Floor, *, computes_again: bool) -> list[Facts]:
    """Returns a line for each trainer: what it measured, its shares of floor and peak, and what we are of it.

    `share_of_floor` counts nothing twice. `share_of_recomputed_floor`, where layers compute again, is that of a step
    which runs every layer's forward twice.
    """
    ours = measured[0]
    lines = []
    for one in measured:
        values = {key: value for key, value in as_values(one).items() if key not in _ELSEWHERE}
        values |= {
            "loss": one.losses[-1] if one.losses else None,
            "first_loss": one.losses[0] if one.losses else None,
            "share_of_floor": _share(floor.seconds, one.step_seconds),
            "share_of_recomputed_floor": _share(floor.recomputed_seconds, one.step_seconds) if computes_again else None,
            "share_of_peak": _share(floor.flops / floor.peak_flops, one.step_seconds),
            "stoker_speed_ratio": _share(ours.tokens_per_second, one.tokens_per_second),
            "stoker_memory_ratio": ours.peak_bytes / one.peak_bytes if one.peak_bytes else None,
            "versions": " ".join(one.versions),
        }
        lines.append(values)
    return lines


def _share(part: float, whole: float) -> float | None:
    return None if math.isnan(whole) or math.isnan(part) else part / whole


def table(facts: Facts) -> Table:
    """Returns the results as a table."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("")
    for name in ("tokens/s", "ms a step", "of floor", "of peak", "peak GiB", "loss", "gradient", "load s", "first s"):
        shown.add_column(name, justify="right")
    for name in ("Stoker's speed", "memory"):
        shown.add_column(name, justify="right")
    for row in facts["results"]:
        if row["error"]:
            shown.add_row(row["name"], "[yellow]no result[/]")
            continue
        speed, memory = row["stoker_speed_ratio"], row["stoker_memory_ratio"]
        shown.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_seconds'] * 1e3:,.1f}",
            _floor_shown(row),
            f"{row['share_of_peak']:.0%}",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['loss']:.4f}",
            f"{row['gradient_norm']:.3g}",
            f"{row['load_seconds']:.1f}",
            f"{row['first_step_seconds']:.1f}",
            *(("", "") if row["name"] == "stoker" else (f"{speed:.2f} x", f"{memory:.2f} x")),
        )
    return shown


def _floor_shown(row: Facts) -> str:
    again = row["share_of_recomputed_floor"]
    return f"{row['share_of_floor']:.0%}" + (f" ({again:.0%})" if again else "")


def floor_values(floor: Floor, tokens: float) -> Facts:
    """Returns the floor as JSON values, with its tokens a second for steps of `tokens`."""
    rates = {
        "tokens_per_second": tokens / floor.seconds,
        "recomputed_tokens_per_second": tokens / floor.recomputed_seconds,
    }
    return asdict(floor) | rates


def write(facts: Facts, output: Path) -> tuple[Path, Path]:
    """Writes `output` as JSON and, beside it, its results as CSV; returns both paths.

    Raises:
        OutputError: they cannot be written.
    """
    beside = output.with_suffix(".csv")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        with beside.open("w", newline="", encoding="utf-8") as file:
            lines = csv_rows(facts)
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise OutputError(f"--out {output} cannot be written: {error.strerror}.") from error
    return output, beside


def csv_rows(facts: Facts) -> list[Facts]:
    """Returns the results as flat lines, each with the cell, the device and the commit."""
    shared = {name: facts[name] for name in ("cell", "title", "device", "commit", "date")}
    return [shared | row for row in facts["results"]]


def commit() -> str:
    """Returns the short hash of the source's commit, with "+" if files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def notices(measured: Sequence[Measured], left_out: Mapping[str, str], *, about_floor: str = "") -> list[str]:
    """Returns sentences about what did not go as asked, after `about_floor`."""
    said = [about_floor] if about_floor else []
    said += [f"{one.name}: {text}" for one in measured for text in one.notices]
    said += [f"{one.name} has no result: {one.error}" for one in measured if one.error]
    return said + [f"{name} is left out: {reason}" for name, reason in left_out.items()]
