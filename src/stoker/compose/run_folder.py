"""The folder of a run: which files it holds, who may write into it, and the facts kept beside the metrics."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.errors import OutputError, naming
from stoker.observe.events import Event, Notice, RunEnded, StepLogged

_PACKAGES = ("stoker", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Names of what a run's folder holds."""

    path: Path

    @classmethod
    def of(cls, name: str) -> "RunFolder":
        """Returns the folder that a configuration names; `~` is the user's home."""
        return cls(Path(name).expanduser())

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, one folder each."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format (adapter runs)."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model in Transformers' format (runs that train every weight)."""
        return self.path / "model"

    @property
    def hang(self) -> Path:
        """Where the processes' threads stood when one of them hung; there only if one did."""
        return self.path / "hang"

    @property
    def config(self) -> Path:
        """The resolved configuration, with where each value came from."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Looks whether a run may use the folder, without touching it; one that holds another run only when told to.

        Raises:
            OutputError: it is no folder, or holds a run and neither `resume` nor `overwrite` was given, or there is
                nothing to resume.
        """
        self.refuse_unusable()
        holds_run = self.config.exists() or self.checkpoints.exists()
        if holds_run and not (resume or overwrite):
            raise OutputError(
                f"output.folder {self.path} already holds a run.",
                fix="Use --resume to go on with it, --overwrite to start anew in it, or name another folder.",
            )
        if resume and not self.config.exists() and self.checkpoints.exists():
            raise OutputError(
                f"{self.config} is missing, which says what run the checkpoints beside it are of.",
                fix="Restore it from a backup, or use --overwrite to start anew.",
            )
        if resume and not self.config.exists():
            raise OutputError(f"There is no run to resume in {self.path}.", fix="Leave out --resume to start one.")

    def refuse_unusable(self) -> None:
        """Raises OutputError where the path, or one above it, is a file, or takes no new ones."""
        for one in (self.path, *self.path.parents):
            if one.exists() and not one.is_dir():
                raise OutputError(
                    f"output.folder {self.path} cannot be made: {one} is a file.", fix="Name another folder."
                )
        nearest = next(one for one in (self.path, *self.path.absolute().parents) if one.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            what = f"output.folder {self.path} cannot be written: {nearest} takes no new files."
            raise OutputError(what, fix="Name another folder, or make it writable.")

    def claim(self, *, overwrite: bool) -> None:
        """Makes the folder ready to be written; with `overwrite`, what an earlier run wrote is removed.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            if overwrite:
                self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"output.folder {self.path} cannot be written: {error.strerror}."
            raise OutputError(what, fix="Name another folder.") from error

    def _clear(self) -> None:
        """Removes what a run wrote, and nothing else that a user may keep there."""
        import shutil

        for name in ("checkpoints", "adapter", "model", "tensorboard", "hang"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("config.yaml", "plan.json", "audit.json", "run.json", "metrics.jsonl", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes `name` as JSON, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, default=str))

    def write_text(self, name: str, text: str) -> None:
        """Writes `name`, whole or not at all; it is on the disk afterwards."""
        aside = self.path / f".{name}.part"
        with naming(self.path / name):
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave the name with nothing in it
            aside.replace(self.path / name)

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns what `write_json` has written as `name`; nothing where there is no such file.

        Raises:
            OutputError: it is damaged.
        """
        path = self.path / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            found = error
        if isinstance(found, dict):
            return found
        raise OutputError(
            "the file is damaged: it holds no JSON object.",
            where=str(path),
            fix="Restore it from a backup, or remove it: what it kept is then found anew.",
        )


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def now() -> str:
    """Returns the local time to the minute, for people."""
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


@dataclass
class Journal:
    """An observer that keeps the notices and the end of a run for `run.json`, and counts the steps taken."""

    notices: list[dict[str, str]] = field(default_factory=list)
    ended: RunEnded | None = None
    num_steps: int = 0

    def handle(self, event: Event) -> None:
        """Keeps notices and the end, and counts steps."""
        if isinstance(event, Notice):
            self.notices.append({"level": event.level, "message": event.message})
        elif isinstance(event, RunEnded):
            self.ended = event
        elif isinstance(event, StepLogged):
            self.num_steps += 1

    def close(self) -> None:
        """Nothing is held."""
