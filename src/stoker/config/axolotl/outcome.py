"""What becomes of a key: the four classes, an entry of the table, and what reading one value gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stoker.config.document import Path, dotted

Kind = Literal["honoured", "automatic", "no effect", "refused"]
KINDS: dict[Kind, str] = {
    "honoured": "it sets a field of ours",
    "automatic": "the engine does it anyway, or the plan decides it",
    "no effect": "nothing hangs on it here",
    "refused": "an unsupported feature; the run does not start",
}
"""The classes of a key, each in words."""


@dataclass(frozen=True)
class Outcome:
    """What became of one value: its class, why, and the fields of ours that it sets.

    `note` says how the meaning shifted, if it did. `follows` names the key that is the cause of a refusal: such a key
    is listed as refused, but is no problem of its own.
    """

    kind: Kind
    text: str
    settings: Mapping[Path, Any] = field(default_factory=dict)
    note: str = ""
    follows: str = ""


@dataclass(frozen=True)
class Reading:
    """One value of the file: its path, and all keys of the top level that are not blank.

    `entry` is where the settings of a dataset's entry go (`("data", "train", 0)`); empty outside of datasets.
    """

    path: Path
    value: Any
    whole: Mapping[str, Any]
    entry: Path = ()

    @property
    def name(self) -> str:
        """The path as people write it."""
        return dotted(self.path)

    def other(self, name: str) -> Any:
        """Returns the value of another key of the top level; None where it is blank."""
        return self.whole.get(name)


Rule = Callable[[Reading], Outcome]


@dataclass(frozen=True)
class Entry:
    """One key of the table: its usual class and meaning, for the docs, and the rule that reads a value."""

    kind: Kind
    means: str
    read: Rule


class UnreadableError(Exception):
    """A value that Axolotl would not take either, or that nothing here stands for: what is wrong and what to do."""

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(what)
