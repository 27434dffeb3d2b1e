"""The kinds of entries that the table is made of."""

from collections.abc import Mapping
from typing import Any

from stoker.config.axolotl.outcome import Entry, Kind, Outcome, Reading, Rule
from stoker.config.axolotl.values import Convert, is_off
from stoker.config.document import Path
from stoker.config.show import inline


def same(value: Any) -> Any:
    """Returns the value as it is."""
    return value


def at(path: str) -> Path:
    """Returns `train.batch_size` as a path."""
    return tuple(path.split("."))


def honoured(settings: Mapping[Path, Any], note: str = "") -> Outcome:
    """Returns the outcome of a value that sets fields of ours, which the text names with their values."""
    names = ", ".join(f"{_shown(path)}: {inline(value)}" for path, value in settings.items())
    return Outcome("honoured", names, settings, note)


def _shown(path: Path) -> str:
    """Returns a path without a dataset's place, which its own key shows."""
    short = path[3:] if len(path) > 3 and isinstance(path[2], int) else path
    return ".".join(str(part) for part in short)


def becomes(path: str, convert: Convert = same, *, note: str = "") -> Entry:
    """Returns the entry of a key that is a field of ours under another name."""

    def read(reading: Reading) -> Outcome:
        return honoured({at(path): convert(reading.value)}, note)

    return Entry("honoured", f"`{path}`" + (f"; {note}" if note else ""), read)


def in_source(name: str, convert: Convert = same, *, note: str = "") -> Entry:
    """Returns the entry of a dataset's key that is a field of our source under another name."""

    def read(reading: Reading) -> Outcome:
        return honoured({(*reading.entry, *at(name)): convert(reading.value)}, note)

    return Entry("honoured", f"`data.train[].{name}`" + (f"; {note}" if note else ""), read)


def automatic(why: str, convert: Convert = same) -> Entry:
    """Returns the entry of a key whose work the engine does anyway."""
    return _fixed("automatic", why, convert)


def no_effect(why: str, convert: Convert = same) -> Entry:
    """Returns the entry of a key that has nothing to change here."""
    return _fixed("no effect", why, convert)


def _fixed(kind: Kind, why: str, convert: Convert) -> Entry:
    def read(reading: Reading) -> Outcome:
        convert(reading.value)
        return Outcome(kind, why)

    return Entry(kind, why, read)


def refused(feature: str, nearest: str, *, harmless: tuple[Any, ...] = (), follows: str = "") -> Entry:
    """Returns the entry of an unsupported feature, with the nearest that works; a value that turns it off is harmless.

    `follows`: the key without which this one says nothing. Where that is blank this one has no effect; where it is set,
    it is the cause of the refusal.
    """

    def read(reading: Reading) -> Outcome:
        if is_off(reading.value) or reading.value in harmless:
            return Outcome("no effect", f"{feature}: off, as it is here")
        if follows and is_off(reading.other(follows) or False):
            return Outcome("no effect", f"only read with {follows}, which is not set")
        return Outcome("refused", f"{feature}. {nearest}", follows=follows)

    means = feature + (f" (part of `{follows}`)" if follows else f". {nearest}")
    return Entry("refused", means, read)


def custom(kind: Kind, means: str, read: Rule) -> Entry:
    """Returns the entry of a key that needs a rule of its own."""
    return Entry(kind, means, read)


def unless_off(kind: Kind, means: str, read: Rule) -> Entry:
    """Returns the entry of a key with a rule of its own, which a value that turns it off does not reach."""

    def checked(reading: Reading) -> Outcome:
        return Outcome("no effect", "off, as it is here") if is_off(reading.value) else read(reading)

    return Entry(kind, means, checked)


def each(names: str, entry: Entry, prefix: str = "") -> dict[str, Entry]:
    """Returns one entry for each of several names, which blanks separate."""
    return {f"{prefix}{name}": entry for name in names.split()}
