"""How far predictions were off on this machine: a line of JSON for each run, beside the calibrations."""

import datetime
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stoker.plan import calibration

_QUOTED = 12


@dataclass(frozen=True)
class Outcome:
    """A run's predicted and measured peak bytes of a device, and seconds of a step."""

    device: str
    model: str
    method: str
    predicted_bytes: int
    measured_bytes: int
    predicted_seconds: float
    measured_seconds: float
    date: str = ""

    @property
    def memory_error(self) -> float:
        """Above 0: more was predicted than measured."""
        return self.predicted_bytes / self.measured_bytes - 1.0

    @property
    def time_error(self) -> float:
        """Above 0: more was predicted than measured."""
        return self.predicted_seconds / self.measured_seconds - 1.0


def path() -> Path:
    """Returns the file of outcomes."""
    return calibration.folder() / "runs.jsonl"


def add(one: Outcome) -> None:
    """Appends a run's outcome; one without a measurement is left out."""
    if one.measured_bytes <= 0 or one.measured_seconds <= 0:
        return
    facts = asdict(one) | {"date": one.date or datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    path().parent.mkdir(parents=True, exist_ok=True)
    with path().open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def read(device: str | None = None) -> list[Outcome]:
    """Returns the outcomes, those of one device where it is named, oldest first; torn lines are skipped."""
    try:
        lines = path().read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = [one for line in lines if (one := _outcome(line)) is not None]
    return [one for one in found if device in (None, one.device)]


def _outcome(line: str) -> Outcome | None:
    try:
        facts: Mapping[str, Any] = json.loads(line)
        one = Outcome(**facts)
        return one if one.measured_bytes > 0 and one.measured_seconds > 0 else None
    except (ValueError, TypeError):
        return None


def quote(device: str | None = None) -> str:
    """Returns how far the last runs' predictions were off, or nothing where there were none."""
    last = read(device)[-_QUOTED:]
    if not last:
        return ""
    memory = statistics.median(one.memory_error for one in last)
    seconds = statistics.median(one.time_error for one in last)
    runs = f"last {len(last)} runs" if len(last) > 1 else "last run"
    return f"Predicted over measured, {runs} here: memory {memory:+.1%}, time {seconds:+.0%}."
