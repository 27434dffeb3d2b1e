"""From a failed validation to sentences: where the value is, what is wrong with it, what to write instead."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from stoker.config import describe, foreign
from stoker.config.document import Path, dotted
from stoker.config.schema import Section

_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_LENGTH = 60


@dataclass(frozen=True)
class Finding:
    """What is wrong with the value at a path, and what to do."""

    path: Path
    what: str
    fix: str


def findings(errors: Iterable[Mapping[str, Any]], values: Mapping[str, Any]) -> list[Finding]:
    """Returns one finding for each wrong place, from pydantic's errors about `values`."""
    kinds: dict[Path, str] = {}
    for error in errors:
        kinds.setdefault(_path(error, values), str(error["type"]))
    # A union reports the value as a whole and what is wrong inside it: the innermost is the one to mend.
    inner = [path for path in kinds if not any(other != path and other[: len(path)] == path for other in kinds)]
    found = [_finding(path, kinds[path], values) for path in inner]
    # A misspelt name is one mistake, not two: the name it should have been is not also missing.
    meant = {(*item.path[:-1], item.fix[:-1].split(" ")[-1].split(".")[-1]) for item in found if item.fix.endswith("?")}
    return [item for item in found if not (kinds[item.path] == "missing" and item.path in meant)]


def _path(error: Mapping[str, Any], values: Any) -> Path:
    """Returns the error's path in the user's own values, without the names of union members that pydantic adds."""
    path: list[str | int] = []
    root = values
    location: Sequence[str | int] = error["loc"]
    for index, part in enumerate(location):
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int)):
            path.append(part)
            values = values[part]
        elif index == len(location) - 1 and error["type"] == "missing":
            path.append(part)
    if error["type"] == "union_tag_invalid" and isinstance(values, dict) and "kind" in values:
        by_kind = any(map(describe.kind_of, describe.sections(describe.annotation_at(tuple(path), root))))
        path += ["kind"] if by_kind else []
    return tuple(path)


def _finding(path: Path, kind: str, values: Mapping[str, Any]) -> Finding:
    if kind == "missing":
        return _missing(path, values)
    if kind == "extra_forbidden":
        return _unknown(path, values)
    value = value_at(path, values)
    return Finding(path, *_wrong(path, value, values))


def value_at(path: Path, values: Any) -> Any:
    """Returns the value at an existing path."""
    for part in path:
        values = values[part]
    return values


def _missing(path: Path, values: Mapping[str, Any]) -> Finding:
    field = describe.field_at(path, values)
    meaning = (field.description or "") if field else ""
    inside = describe.sections(describe.annotation_at(path, values))
    needed = [name for name, inner in inside[0].model_fields.items() if inner.is_required()] if inside else []
    extra = f" It needs at least {', '.join(needed)}." if needed else ""
    return Finding(path, f"{dotted(path)} is missing.", f"{' '.join(meaning.split())}{extra}")


def _unknown(path: Path, values: Mapping[str, Any]) -> Finding:
    *parent, name = path
    section = describe.section_at(tuple(parent), values)
    return Finding(path, f"{dotted(path)} is not a setting.", _advice(str(name), tuple(parent), section))


def _advice(name: str, parent: Path, section: type[Section] | None) -> str:
    """Returns what to do about an unknown name: another trainer's, a misspelt or a misplaced one, in this order."""
    if name in foreign.NOT_A_SETTING:
        return foreign.NOT_A_SETTING[name]
    if name in foreign.SAME_THING:
        return f"Here it is {foreign.SAME_THING[name]}."
    allowed = list(section.model_fields) if section else []
    elsewhere = [path for path, _ in describe.walk() if path[:-1] != parent and path[-1] != "kind"]
    homes = list(dict.fromkeys(dotted(path) for path in elsewhere if path[-1] == name))
    leaves = {str(path[-1]): dotted(path) for path in reversed(elsewhere)}
    near = difflib.get_close_matches(name.lower(), allowed, 1, 0.75)
    far = difflib.get_close_matches(name.lower(), leaves, 1, 0.8)
    vague = difflib.get_close_matches(name.lower(), allowed, 1, 0.6)
    if homes and not near:
        return f"It belongs elsewhere: {' or '.join(homes)}."
    if near or far or vague:
        return f"Did you mean {(near or [leaves[word] for word in far] or vague)[0]}?"
    place = dotted(parent) or "the top level"
    return f"What {place} may hold: {', '.join(allowed)}."


def _wrong(path: Path, value: Any, values: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what is wrong with a value and what to do."""
    name = dotted(path)
    annotation = describe.annotation_at(path, values)
    words = describe.choices(annotation)
    outer = describe.annotation_at(path[:-1], values) if path[-1] == "kind" else None
    kinds = tuple(kind for kind in map(describe.kind_of, describe.sections(outer)) if kind)
    words = kinds or words
    expected = _either(kinds) if kinds else describe.expectation(annotation)
    if value is None:
        return f"{name} is empty; it must be {expected}.", "Fill it in, or remove the line for the default."
    what = f"{name} = {_show(value)}: must be {expected}."
    return what, _hint(path, value, annotation, words)


def _hint(path: Path, value: Any, annotation: Any, words: Sequence[str]) -> str:
    kinds = [describe.plain(member) for member in describe.members(annotation)]
    if not isinstance(value, str):
        return f'Quote it: "{value}".' if str in kinds and not isinstance(value, dict | list) else ""
    bare = tuple(part for part in path if isinstance(part, str))
    if (bare, value.lower()) in foreign.NOT_YET:
        return foreign.NOT_YET[bare, value.lower()]
    return _form_hint(value, annotation, kinds) or _close_hint(value, annotation, words)


def _form_hint(value: str, annotation: Any, kinds: Sequence[Any]) -> str:
    """Returns how to write what was probably meant by a text that stands where another kind of value belongs."""
    if bool in kinds and value.lower() in _YES_NO:
        return f"Write {_YES_NO[value.lower()]}."
    if (int in kinds or float in kinds) and _is_number(value):
        return f"Write it without quotes: {value}."
    if describe.sections(annotation) and any(get_origin(kind) is list for kind in kinds):
        return f"Write it as a list: [{{path: {value}}}]."
    return ""


def _close_hint(value: str, annotation: Any, words: Sequence[str]) -> str:
    by_kind = [kind for kind in map(describe.kind_of, describe.sections(annotation)) if kind]
    close = difflib.get_close_matches(value.lower(), by_kind or words, 1, 0.6)
    if not close:
        return ""
    return f"Write {{kind: {close[0]}}}." if by_kind else f"Did you mean {close[0]}?"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(value: Any) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
