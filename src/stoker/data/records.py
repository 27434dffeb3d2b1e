"""What a row becomes before it is rendered and tokenised, and how a row's fields are read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stoker.errors import DataError

Row = Mapping[str, Any]
Detail = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them: `role`, `content` and whatever else the row gave; tools if it has any.

    `trains` says for each message whether it trains (None: its role decides); `details` which characters of its content
    do, as `(start, end)`. Both are None if no message says so. `label` marks an answer as desirable (1) or not (0).
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    trains: tuple[bool | None, ...] | None = None
    details: tuple[Detail | None, ...] | None = None
    label: int | None = None


@dataclass(frozen=True)
class Texts:
    """Texts tokenised one by one and laid end to end: `(text, trains)`.

    `whole` texts begin and end as the tokenizer does it (BOS if it adds one, EOS); others are taken as they are.
    `label` is as in `Conversation`; `steps` are labels of the texts, -1 for none, kept at the last token of each.
    """

    parts: tuple[tuple[str, bool], ...]
    whole: bool = True
    label: int | None = None
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Given:
    """Token ids with their mask, as the row has them."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Conversation | Texts
    rejected: Conversation | Texts


Converted = Conversation | Texts | Given | Pair


def labelled(answer: Conversation | Texts, label: int) -> Conversation | Texts:
    """Returns the answer with its label."""
    return replace(answer, label=label)


def with_our_names(row: Row, fields: Mapping[str, str]) -> Row:
    """Returns the row with our names of its fields beside its own."""
    renamed = {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
    return {**row, **renamed} if renamed else row


def names(row: Row) -> str:
    """Returns the row's fields for a message."""
    return ", ".join(map(str, row)) or "none"


def kind(value: Any) -> str:
    """Returns what a value is, for a message."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), type(value).__name__)


def decoded(value: Any) -> Any:
    """Returns a list or object that is kept as JSON text, as CSV and some Parquet files do; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def text_of(row: Row, name: str, fields: Mapping[str, str], *, optional: bool = False) -> str:
    """Returns a field that must be text. Raises DataError naming it as the row does."""
    value = row.get(name)
    if value is None and optional:
        return ""
    theirs = fields.get(name, name)
    if value is None:
        raise DataError(f"field {theirs!r} is missing or null; the row has: {names(row)}.")
    if not isinstance(value, str):
        raise DataError(f"field {theirs!r} is {kind(value)}, not text.")
    return value


def list_of(row: Row, name: str, fields: Mapping[str, str]) -> list[Any]:
    """Returns a field that must be a list with entries. Raises DataError naming it as the row does."""
    value, theirs = decoded(row.get(name)), fields.get(name, name)
    if value is None:
        raise DataError(f"field {theirs!r} is missing or null; the row has: {names(row)}.")
    if not isinstance(value, list | tuple):
        raise DataError(f"field {theirs!r} is {kind(value)}, not a list.")
    if not value:
        raise DataError(f"field {theirs!r} is empty.")
    return list(value)


def flag_of(value: Any, place: str) -> bool:
    """Returns a truth value; 0 and 1 count as such. Raises DataError naming the place."""
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise DataError(f"{place} is {value!r}, not true or false.")
