"""The table, the picture and the verdict of `plan_proof.py`, with this version's predictions of the measured cells."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.plan_cells import CPU, DORA, GIB, GRID, Cell, is_held_out, predict
from stoker.plan import speed
from stoker.plan.calibration import Calibration
from stoker.plan.hardware import Device
from stoker.plan.ladder import Ladder

MEMORY_BOUND, UNDER_BOUND, TIME_BOUND = 0.05, 0.03, 0.15
# Of tiny models on a CPU, whose memory is mostly PyTorch's libraries and is held to nothing.
CPU_TIME_BOUND = 0.25
WANTED_SHARE = 0.9


COLUMNS = (
    *("cell", "held_out", "measured_gib", "predicted_gib", "memory_error"),
    *("card_gib", "predicted_card_gib", "card_error", "measured_ms", "predicted_ms", "time_error"),
)


@dataclass(frozen=True)
class Line:
    """A cell, measured and predicted: allocated bytes at the peak, bytes of the card, seconds of a step."""

    name: str
    held_out: bool
    measured_bytes: int
    predicted_bytes: int
    card_bytes: int
    predicted_card_bytes: int
    measured_seconds: float
    predicted_seconds: float

    @property
    def memory_error(self) -> float:
        """Of the allocated peak: above zero, the plan said more than was needed."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def card_error(self) -> float:
        """Of all that the card held, the driver's part and what the allocator reserved included."""
        return self.predicted_card_bytes / self.card_bytes - 1 if self.card_bytes else 0.0

    @property
    def time_error(self) -> float:
        """Of a step."""
        return self.predicted_seconds / self.measured_seconds - 1


def _calibration(found: Mapping[str, Any]) -> Calibration | None:
    """Returns a CPU's figures: the best of all turns at measuring them, one a model, as others used the machine too."""
    turns = [Calibration(**one["calibration"]) for one in found["cells"].values() if one.get("calibration")]
    if not turns:
        return None
    least = ("call_seconds", "logit_seconds")
    shapes = ("attention_half", "head_power")
    cpu = {
        name: statistics.median(values) if name in shapes else min(values) if name in least else max(values)
        for name in turns[0].cpu
        for values in [[one.cpu[name] for one in turns]]
    }
    products = {name: max(one.products[name] for one in turns) for name in turns[0].products}
    best = {name: max(getattr(one, name) for one in turns) for name in ("copy", "attention")}
    return replace(turns[0], products=products, cpu=cpu, call_seconds=min(one.call_seconds for one in turns), **best)


def lines(found: Mapping[str, Any], cells: Sequence[Cell] = (*GRID, *DORA)) -> list[Line]:
    """Returns the measured cells with the predictions of this version's formulas."""
    made, measured = [], _calibration(found)
    for cell in cells:
        facts = found["cells"].get(cell.name)
        if facts is None or "error" in facts:
            continue
        told = dict(facts["device"])
        told["compute_capability"] = tuple(told["compute_capability"]) if told["compute_capability"] else None
        ran = facts["plan"]
        ladder = Ladder(tuple(ran["keep"]), ran["offload_activations"], ran["layers"], ran["tile_tokens"])
        now = predict(cell, Device(**told), rows=speed.Rows(**facts["rows"]), ladder=ladder, measured=measured)
        made.append(
            Line(
                cell.name,
                is_held_out(cell.name, CPU if cells is CPU else GRID),
                facts["peak_bytes"],
                # A CPU's peak is the process's, PyTorch's libraries included.
                now.plan.memory.total if cells is CPU else now.allocated_bytes,
                facts["peak_reserved_bytes"] + facts["outside_bytes"],
                now.plan.memory.total,
                facts["step_seconds"],
                now.seconds,
            )
        )
    return made


def verdict(made: Sequence[Line], time_bound: float = TIME_BOUND) -> dict[str, float]:
    """Returns the shares of the cells that are within the bounds, and the worst errors."""
    count = max(1, len(made))
    return {
        "cells": len(made),
        "memory within 5%": sum(abs(one.memory_error) <= MEMORY_BOUND for one in made) / count,
        "memory never under by 3%": sum(one.memory_error >= -UNDER_BOUND for one in made) / count,
        f"time within {time_bound:.0%}": sum(abs(one.time_error) <= time_bound for one in made) / count,
        "worst memory": max((one.memory_error for one in made), key=abs, default=0.0),
        "worst time": max((one.time_error for one in made), key=abs, default=0.0),
    }


def _row(one: Line) -> list[str]:
    return [
        one.name,
        "yes" if one.held_out else "",
        *(f"{value / GIB:.2f}" for value in (one.measured_bytes, one.predicted_bytes)),
        f"{one.memory_error:+.1%}",
        *(f"{value / GIB:.2f}" for value in (one.card_bytes, one.predicted_card_bytes)),
        f"{one.card_error:+.1%}",
        *(f"{value * 1e3:.1f}" for value in (one.measured_seconds, one.predicted_seconds)),
        f"{one.time_error:+.1%}",
    ]


def write(source: Path, folder: Path) -> int:
    """Writes plan_proof.csv and .svg (plan_proof_cpu of a CPU's cells); returns 1 where a bound does not hold."""
    found = json.loads(source.read_text())
    made, name, time_bound = lines(found), "plan_proof", TIME_BOUND
    if not made:
        made, name, time_bound = lines(found, CPU), "plan_proof_cpu", CPU_TIME_BOUND
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(_row(one) for one in made)
    (folder / f"{name}.svg").write_text(_picture(made, found["device"], time_bound))
    for one in made:
        name, held, *cells = _row(one)
        print(f"{name:55} {'held' if held else '':4} " + " ".join(f"{cell:>8}" for cell in cells))
    for name, some in (
        ("all", made),
        ("fitted", [one for one in made if not one.held_out]),
        ("held out", [one for one in made if one.held_out]),
    ):
        print(name, {key: round(value, 3) for key, value in verdict(some, time_bound).items()})
    fails = [name for name, facts in found["cells"].items() if "error" in facts]
    print("failed:", fails or "none")
    tight = {name: facts for name, facts in found["cells"].items() if "rows_that_fit" in facts}
    for name, facts in tight.items():
        print(f"{name:40} {facts['rows_that_fit']} rows: trains {facts['trains']}, {facts['one_more_fails']=}")
    whole = verdict(made, time_bound)
    holds = whole["memory within 5%"] >= WANTED_SHARE and whole["memory never under by 3%"] == 1.0
    in_time = whole[f"time within {time_bound:.0%}"] >= WANTED_SHARE
    return 0 if in_time and (holds or time_bound == CPU_TIME_BOUND) else 1


_SIDE, _MARGIN = 420, 64


def _picture(made: Sequence[Line], device: str, time_bound: float = TIME_BOUND) -> str:
    """Predicted against measured, memory and time beside one another, on logarithmic axes with the bounds."""
    memory = [(one.measured_bytes / GIB, one.predicted_bytes / GIB, one) for one in made]
    seconds = [(one.measured_seconds, one.predicted_seconds, one) for one in made]
    width = 2 * (_SIDE + _MARGIN) + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_SIDE + 100}" font-family="sans-serif" '
            'font-size="12"><rect width="100%" height="100%" fill="white"/>',
            _scatter(memory, 0, f"Allocated at the peak, GiB ({escape(device)})", MEMORY_BOUND),
            _scatter(seconds, _SIDE + _MARGIN, "Seconds of a step", time_bound),
            f'<text x="{_MARGIN}" y="{_SIDE + 92}">filled: took part in fitting; open: held out; '
            "dashed: the bound</text>",
            "</svg>",
        ]
    )


def _scatter(points: Sequence[tuple[float, float, Line]], left: float, title: str, bound: float) -> str:
    import math

    values = [value for one in points for value in one[:2]] or [1.0]
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08
    side = _SIDE - 20

    def x_of(value: float) -> float:
        return left + _MARGIN + side * (math.log10(value) - low) / (high - low)

    def y_of(value: float) -> float:
        return 30 + side * (high - math.log10(value)) / (high - low)

    ends = 10**low, 10**high
    parts = [f'<text x="{left + _MARGIN}" y="18" font-size="14">{title}</text>']
    parts.append(
        f'<rect x="{x_of(ends[0]):.1f}" y="30" width="{side}" height="{side}" fill="none" stroke="#888" />'
        f'<svg x="{x_of(ends[0]):.1f}" y="30" width="{side}" height="{side}">'
    )
    for factor, dash in ((1.0, ""), (1 + bound, ' stroke-dasharray="4 4"'), (1 - bound, ' stroke-dasharray="4 4"')):
        shift = x_of(ends[0]), 30
        first, last = y_of(ends[0] * factor) - shift[1], y_of(ends[1] * factor) - shift[1]
        parts.append(f'<line x1="0" y1="{first:.1f}" x2="{side}" y2="{last:.1f}" stroke="#888"{dash}/>')
    parts.append("</svg>")
    for step in range(math.ceil(low), math.floor(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**step
            if ends[0] <= value <= ends[1]:
                parts.append(f'<text x="{x_of(value):.1f}" y="{side + 46}" text-anchor="middle">{value:g}</text>')
                parts.append(
                    f'<text x="{left + _MARGIN - 6}" y="{y_of(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
                )
    for measured, predicted, one in points:
        fill = "white" if one.held_out else "#0072b2"
        parts.append(
            f'<circle cx="{x_of(measured):.1f}" cy="{y_of(predicted):.1f}" r="4" fill="{fill}" stroke="#0072b2">'
            f"<title>{escape(one.name)}</title></circle>"
        )
    middle = left + _MARGIN + side / 2
    parts.append(f'<text x="{middle}" y="{side + 66}" text-anchor="middle">measured (up: predicted)</text>')
    return "\n".join(parts)
