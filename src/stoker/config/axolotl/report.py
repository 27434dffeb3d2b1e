"""What became of every key of a file, in one report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stoker.config.axolotl.outcome import KINDS, Kind
from stoker.config.document import Path, dotted
from stoker.errors import ConfigError, Problem

BLANK = "blank: as if it were not there"


@dataclass(frozen=True)
class Line:
    """One key: its path, its value, its class and why; `where` is `file:line`, `note` how its meaning shifted.

    `fix` is what to do about a refusal. `is_cause` is False for a key that is refused because of another one;
    `is_mistake`: the key or its value is wrong for Axolotl too.
    """

    path: Path
    value: Any
    kind: Kind
    text: str
    where: str
    note: str = ""
    fix: str = ""
    is_cause: bool = True
    is_mistake: bool = False

    @property
    def name(self) -> str:
        """The path as people write it."""
        return dotted(self.path)


@dataclass(frozen=True)
class Report:
    """Every key of a file in its order, and Axolotl's defaults that were written out for keys it does not name."""

    file: str
    lines: tuple[Line, ...] = ()
    defaults: tuple[tuple[Path, Any], ...] = field(default=())

    def of(self, kind: Kind) -> list[Line]:
        """Returns the lines of one class."""
        return [line for line in self.lines if line.kind == kind]

    def counts(self) -> dict[Kind, int]:
        """Returns how many keys are in each class."""
        return {kind: len(self.of(kind)) for kind in KINDS}

    def grouped(self, kind: Kind) -> list[tuple[list[Line], str]]:
        """Returns the lines of one class, those that say the same together, in the order of the file."""
        groups: dict[str, list[Line]] = {}
        for line in self.of(kind):
            groups.setdefault(line.text, []).append(line)
        return [(lines, text) for text, lines in groups.items()]


class TranslationError(ConfigError):
    """A file of Axolotl's asks for what is not done, or is wrong; carries the report beside the problems."""

    def __init__(self, problems: Sequence[Problem], report: Report) -> None:
        self.report = report
        super().__init__(problems)
