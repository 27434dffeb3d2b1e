"""The schema in words: what a field may hold, which section a path leads to. Error messages and docs share it."""

import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from stoker.config.document import Path
from stoker.config.schema import DEFAULT_KINDS, RunConfig, Section

_UNIONS = (Union, types.UnionType)
_PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
_ATTRIBUTES = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt", MinLen: "min_length", MaxLen: "max_length"}
_PLURAL = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}


@cache
def annotations(section: type[Section]) -> dict[str, Any]:
    """Returns the annotation of each field, constraints included."""
    hints = get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


def members(annotation: Any) -> tuple[Any, ...]:
    """Returns the alternatives of a union, looking through `Annotated`; anything else is its own only member."""
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in _UNIONS:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in _UNIONS:
        return (annotation,)
    return tuple(inner for member in get_args(annotation) for inner in members(member))


def sections(annotation: Any) -> tuple[type[Section], ...]:
    """Returns every section class that the annotation mentions, in lists too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    return tuple(section for inner in get_args(annotation) for section in sections(inner))


def kind_of(section: type[Section]) -> str | None:
    """Returns the `kind` that chooses a section among alternatives, or None where there is none to choose."""
    kind = annotations(section).get("kind")
    return get_args(kind)[0] if kind is not None and len(get_args(kind)) == 1 else None


def section_at(path: Path, values: Any) -> type[Section] | None:
    """Returns the section class that `path` leads to in `values`, or None where it leads to a plain value."""
    section: type[Section] | None = RunConfig
    is_mapping = False  # of names to sections, whose next part is a name
    for part in path:
        values = _inside(values, part)
        if isinstance(part, int) or is_mapping:
            is_mapping = False
            continue
        annotation = annotations(section).get(part) if section else None
        section = _chosen(annotation, values)
        is_mapping = any(get_origin(plain(member)) is dict and sections(member) for member in members(annotation))
    return section if not path or (isinstance(values, dict) and not is_mapping) else None


def annotation_at(path: Path, values: Any) -> Any:
    """Returns the annotation of the field, or of the entry of a list or mapping, at `path`; None if there is none."""
    *parent, name = path
    section = section_at(tuple(parent), values) if isinstance(name, str) else None
    if section is not None or not parent:
        return annotations(section or RunConfig).get(str(name))
    container, inside = (list, 0) if isinstance(name, int) else (dict, 1)
    outer = map(plain, members(annotation_at(tuple(parent), values)))
    return next((get_args(member)[inside] for member in outer if get_origin(member) is container), None)


def field_at(path: Path, values: Any) -> FieldInfo | None:
    """Returns the field at `path`, or None when the schema has no such field."""
    section = section_at(path[:-1], values)
    return section.model_fields.get(str(path[-1])) if section else None


def _inside(values: Any, part: str | int) -> Any:
    if isinstance(values, list):
        return values[part] if isinstance(part, int) and part < len(values) else None
    return values.get(part) if isinstance(values, dict) else None


def _chosen(annotation: Any, value: Any) -> type[Section] | None:
    """Returns the section among the annotation's that `value` is meant for, by its kind or the default kind."""
    found = sections(annotation)
    if len(found) < 2:
        return found[0] if found else None
    kind = str(value.get("kind")) if isinstance(value, dict) else None
    defaults = [section for section in found if kind_of(section) in DEFAULT_KINDS]
    return next((section for section in found if kind_of(section) == kind), (defaults or found)[0])


def plain(annotation: Any) -> Any:
    """Returns the annotation without its constraints."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def walk(section: type[Section] = RunConfig, prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Yields the path and field of everything that can be set; list items have no index in their path."""
    for name, field in section.model_fields.items():
        yield (*prefix, name), field
        for inner in sections(annotations(section)[name]):
            yield from walk(inner, (*prefix, name))


def choices(annotation: Any) -> tuple[str, ...]:
    """Returns the words that a field may hold: of its literals, and of literals in its lists."""
    found: list[str] = []
    for member in members(annotation):
        inner = plain(member)
        if get_origin(inner) is Literal:
            found += [str(word) for word in get_args(inner)]
        elif get_origin(inner) is list:
            found += choices(get_args(inner)[0])
    return tuple(found)


def expectation(annotation: Any) -> str:
    """Returns what a field may hold, as a phrase that follows "must be"."""
    inner = [member for member in members(annotation) if kind_of_member(member)]
    phrases = [_phrase(member) for member in members(annotation) if member not in inner]
    kinds = [str(kind_of_member(member)) for member in inner]
    if kinds:
        phrases.insert(0, f"a section with kind: {_either(kinds)}")
    return _either(phrases)


def kind_of_member(annotation: Any) -> str | None:
    """Returns the `kind` of an alternative that is a section chosen by kind."""
    inner = plain(annotation)
    return kind_of(inner) if isinstance(inner, type) and issubclass(inner, Section) else None


def _phrase(annotation: Any) -> str:
    inner = plain(annotation)
    bounds = _bounds(annotation)
    if get_origin(inner) is Literal:
        return _either(list(map(str, get_args(inner))))
    if get_origin(inner) is list:
        return _list_phrase(get_args(inner)[0], bounds)
    if get_origin(inner) is dict:
        return "a section of name: name pairs"
    if isinstance(inner, type) and issubclass(inner, Section):
        return f"a section with {', '.join(inner.model_fields)}"
    return _PLAIN[inner] + _range_phrase(bounds)


def _list_phrase(item: Any, bounds: dict[type, Any]) -> str:
    if sections(item):
        return "a list of sources, each `- path: ...`"
    exact = bounds.get(MinLen) if bounds.get(MinLen) == bounds.get(MaxLen) else None
    phrase = _PLURAL.get(_PLAIN.get(plain(item), ""), "") or expectation(item)
    return f"a list of {exact} {phrase}" if exact else f"a list of {phrase}"


def _bounds(annotation: Any) -> dict[type, Any]:
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    bounds = [bound for extra in extras for bound in getattr(extra, "metadata", ())]
    return {type(bound): getattr(bound, _ATTRIBUTES[type(bound)]) for bound in bounds if type(bound) in _ATTRIBUTES}


def _range_phrase(bounds: dict[type, Any]) -> str:
    if Ge in bounds and Le in bounds:
        return f" from {bounds[Ge]:g} to {bounds[Le]:g}"
    words = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    parts = [f"{word} {bounds[kind]:g}" for kind, word in words.items() if kind in bounds]
    joiner = " of" if parts and parts[0].startswith("at") else ""
    return f"{joiner} {' and '.join(parts)}" if parts else ""


def _either(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    last = " or " if all(" " not in phrase for phrase in phrases) else ", or "
    return ", ".join(phrases[:-1]) + last + phrases[-1]
