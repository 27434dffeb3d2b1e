"""Errors that Stoker raises on purpose: what is wrong, where, and what to do.

A `UserError` is a mistake that the user can mend (exit code 2, never a traceback); any other `StokerError` is a failure
of the run (exit code 1).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `what`, with the value; `where`, as `file:line` or a name; `fix`, what to do."""

    what: str
    where: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f" {self.fix}" if self.fix else ""
        return f"{place}{self.what}{remedy}"


class StokerError(Exception):
    """Base of all errors raised on purpose; carries one or more problems and the process's exit code."""

    exit_code = 1

    def __init__(self, what: str | Sequence[Problem], *, where: str | None = None, fix: str | None = None) -> None:
        self.problems = (Problem(what, where, fix),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(map(str, self.problems)))


class UserError(StokerError):
    """A mistake in what the user gave; the message says how to mend it."""

    exit_code = 2


class ConfigError(UserError):
    """The YAML, a `--set` override or a command-line option is wrong."""


class DataError(UserError):
    """A dataset cannot be read, or a row of it is wrong."""


class ModelError(UserError):
    """A model folder, its configuration, weights or tokenizer cannot be used."""


class PlanError(UserError):
    """What was asked for cannot run on this hardware; the message names the nearest that can."""


class OutputError(UserError):
    """The output folder cannot be used: it holds another run, or cannot be written."""


class CheckpointError(StokerError):
    """A checkpoint cannot be written or read."""


class TrainingError(StokerError):
    """Training cannot go on: the loss is not finite, or memory is exhausted at the smallest micro-batch."""


class HangError(TrainingError):
    """One of several processes has not moved for so long that the others no longer wait for it."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an error of the operating system names `path` where it names no file: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
