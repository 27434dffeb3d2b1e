"""`metrics.jsonl`: one JSON object a line for every logged step and evaluation, exact across resumes.

A step's line holds `step`, `epoch`, `loss`, `learning_rate`, `gradient_norm`, `tokens_per_second`, `memory_bytes`,
`num_tokens`, `num_trained_tokens`, `padding_share` and `seconds`; an evaluation's line holds `step`, `validation_loss`
(or `<split>_loss`), `num_trained_tokens`, `seconds` and `best`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from stoker.errors import naming
from stoker.observe.events import Evaluated, Event, RunStarted, StepLogged

_LEFT_OUT = {"total_steps", "metrics"}


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file in order; a last line cut short by a killed process is left out."""
    if not path.is_file():
        return []
    return list(_records(path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # Only the last line can be half written: each is flushed before the next begins.


class MetricsFile:
    """Writes the events of a run to `path`, flushed line by line.

    A resumed run repeats the steps after its checkpoint, so the lines of those steps are dropped when it starts;
    a fresh run (`first_step` 0) starts an empty file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def handle(self, event: Event) -> None:
        """Appends a line for a logged step or an evaluation."""
        if isinstance(event, RunStarted):
            self._open(event.first_step)
        elif isinstance(event, StepLogged):
            values = {key: value for key, value in dataclasses.asdict(event).items() if key not in _LEFT_OUT}
            self._write({**values, **event.metrics})
        elif isinstance(event, Evaluated):
            self._write(
                {
                    "step": event.step,
                    f"{event.split}_loss": event.loss,
                    "num_trained_tokens": event.num_trained_tokens,
                    "seconds": event.seconds,
                    "best": event.best,
                }
            )

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, first_step: int) -> None:
        kept = [record for record in read(self.path) if first_step and record["step"] <= first_step]
        aside = self.path.with_suffix(".jsonl.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
