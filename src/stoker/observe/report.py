"""`report.html`: one self-contained page on a run, from the files in its folder. Opens offline.

It reads `metrics.jsonl` (curves), `run.json` (versions, outcome, answers, notices), `plan.json` (choices with reasons),
`audit.json` (what the data holds) and `config.yaml`; what is missing is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from stoker.errors import naming
from stoker.observe import metrics
from stoker.observe.progress import duration, size

Record = Mapping[str, Any]
_SEVERAL = ("ddp", "fsdp2", "deepspeed")
_STRATEGIES_OF = {
    "num_processes": _SEVERAL,
    "per_node": _SEVERAL,
    "sharing": _SEVERAL,
    "replicas": ("fsdp2",),
    "reshards": ("fsdp2",),
    "on_host": ("fsdp2", "deepspeed"),
    "stage": ("deepspeed",),
    "on_disk": ("deepspeed",),
    "bucket_values": ("deepspeed",),
}
"""Fields of a plan that not every strategy has a use for."""
_INK, _ACCENT, _WARM, _FAINT = "#1f2933", "#0f6fc6", "#d9480f", "rgba(15,111,198,0.22)"


def write(folder: Path) -> Path:
    """Writes `folder/report.html` from the run's files and returns its path."""
    from jinja2 import Environment, select_autoescape

    template = resources.files("stoker.observe").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=select_autoescape(default_for_string=True), trim_blocks=True)
    environment.filters |= {"duration": duration, "size": size, "figure": _cell}
    records = metrics.read(folder / "metrics.jsonl")
    page = environment.from_string(template).render(
        name=folder.name,
        run=_read_json(folder / "run.json"),
        plan=_meant(_read_json(folder / "plan.json")),
        audit=_read_json(folder / "audit.json"),
        config=_read_text(folder / "config.yaml"),
        summary=_summary(records),
        curves=_curves(records),
    )
    target = folder / "report.html"
    with naming(target):
        target.write_text(page, encoding="utf-8")
    return target


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _meant(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan without the fields that say nothing of its strategy, which `plan.json` holds all the same."""
    strategy = plan.get("strategy")
    return {key: value for key, value in plan.items() if key not in _STRATEGIES_OF or strategy in _STRATEGIES_OF[key]}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _cell(value: object) -> str:
    """Formats a value of a table: yes or no, thousands separated, floats to four digits, lists joined."""
    if isinstance(value, bool) or value is None:
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(item)}" for key, item in value.items()) or "-"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_cell, value)) or "-"
    return str(value)


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the headline figures: first and last losses, best validation loss, median speed, peak memory."""
    steps = [record for record in records if "loss" in record]
    validation = [record for record in records if "validation_loss" in record]
    if not steps:
        return {}
    speeds = sorted(record["tokens_per_second"] for record in steps)
    return {
        "steps": steps[-1]["step"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "first_validation_loss": validation[0]["validation_loss"] if validation else None,
        "best_validation_loss": min(record["validation_loss"] for record in validation) if validation else None,
        "tokens_per_second": speeds[len(speeds) // 2],
        "memory_bytes": max(record["memory_bytes"] for record in steps),
        "trained_tokens": sum(record["num_trained_tokens"] for record in steps),
    }


def _smooth(values: Sequence[float], *, window: float) -> list[float]:
    """Returns the exponential moving average with bias correction (as Adam's), over about `window` points."""
    decay, average, smoothed = 1 - 1 / max(window, 1.0), 0.0, []
    for index, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        smoothed.append(average / (1 - decay**index) if decay else value)
    return smoothed


def _curves(records: Sequence[Record]) -> str:
    """Returns the interactive figure as HTML, with its library inline, or nothing for a run without steps."""
    steps = [record for record in records if "loss" in record and math.isfinite(record["loss"])]
    if not steps:
        return ""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=3,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}], [{}, {}]],
        row_heights=[0.46, 0.27, 0.27],
        vertical_spacing=0.11,
        horizontal_spacing=0.09,
        subplot_titles=("Loss (nats a trained token)", "Learning rate", "Gradient norm", "Tokens / s", "Memory (GiB)"),
    )
    x = [record["step"] for record in steps]

    def line(values: list[float], name: str, row: int, col: int, **style: Any) -> None:
        trace = go.Scatter(x=x, y=values, name=name, mode="lines", showlegend=row == 1, line=style)
        figure.add_trace(trace, row=row, col=col)

    losses = [record["loss"] for record in steps]
    line(losses, "training", 1, 1, color=_FAINT, width=1)
    line(_smooth(losses, window=len(losses) / 50), "training, smoothed", 1, 1, color=_ACCENT, width=2.5)
    _add_validation(figure, go, [record for record in records if "validation_loss" in record])
    line([record["learning_rate"] for record in steps], "learning rate", 2, 1, color=_ACCENT, width=2)
    line([record["gradient_norm"] for record in steps], "gradient norm", 2, 2, color=_ACCENT, width=1.2)
    line([record["tokens_per_second"] for record in steps], "tokens / s", 3, 1, color=_ACCENT, width=1.2)
    line([record["memory_bytes"] / 2**30 for record in steps], "memory", 3, 2, color=_ACCENT, width=2)
    figure.update_layout(
        height=820,
        template="plotly_white",
        margin={"l": 60, "r": 24, "t": 40, "b": 50},
        font={"family": "system-ui, sans-serif", "color": _INK, "size": 13},
        legend={"orientation": "h", "y": 1.06, "x": 0, "xanchor": "left"},
        hovermode="x unified",
    )
    figure.update_xaxes(title_text="step", title_standoff=6)
    figure.update_yaxes(rangemode="tozero", row=3)
    return figure.to_html(full_html=False, include_plotlyjs="inline", config={"displaylogo": False, "responsive": True})


def _add_validation(figure: Any, go: Any, validation: Sequence[Record]) -> None:
    if validation:
        figure.add_trace(
            go.Scatter(
                x=[record["step"] for record in validation],
                y=[record["validation_loss"] for record in validation],
                name="validation",
                mode="lines+markers",
                line={"color": _WARM, "width": 2.5},
                marker={"size": 7},
            ),
            row=1,
            col=1,
        )
