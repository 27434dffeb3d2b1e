"""A YAML document as plain values, with the line of every key and none of YAML 1.1's surprises.

Scalars follow YAML 1.2's core schema: `2e-5` is a number, only `true` and `false` are booleans (`on`, `no` and `yes`
are text), `12:30` and `2024-01-01` are text. Duplicate keys and tags, which could construct objects, are refused.
"""

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from stoker.errors import Problem

Path = tuple[str | int, ...]

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_STR = "tag:yaml.org,2002:str"
_SCALARS = (
    (_NULL, r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    (_BOOL, r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    (_INT, r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (_FLOAT, r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    (_FLOAT, r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
)


class _Composer(yaml.SafeLoader):
    """Parses into nodes with line marks; its own table of scalars replaces YAML 1.1's."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own shape)


for _tag, _pattern, _first in _SCALARS:
    _Composer.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass
class Document:
    """The values of a YAML text, the line (from 1) of each path, and what is wrong with the text itself."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read(text: str, name: str) -> Document:
    """Returns the document in `text`; `name` stands before line numbers in problems."""
    document = Document()
    try:
        node = _Composer(text).get_single_node()
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error, name))
        return document
    if node is not None:
        document.value = _Reader(document, name).value(node, ())
    return document


def scalar(text: str) -> Any:
    """Returns the value of a YAML fragment such as `1e-4` or `[a, b]`.

    Raises:
        ValueError: the fragment is not valid YAML; the message says why in a few words.
    """
    document = read(text, "")
    if document.problems:
        raise ValueError(document.problems[0].what)
    return document.value


def _syntax_problem(error: yaml.YAMLError, name: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"{name}:{mark.line + 1}" if mark else name
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "cannot start any token" in what and "\\t" in what:
        return Problem("a tab is used to indent; YAML allows spaces only.", where, "Replace the tab with spaces.")
    if "mapping values are not allowed" in what:
        return Problem(
            "a second `key:` stands where a value belongs.", where, "Put it on a line of its own, or quote it."
        )
    advice = "Look for a missing colon, quote or bracket, or wrong indentation, here or in the line above."
    return Problem(f"this is not valid YAML: {what}.", where, advice)


class _Reader:
    """Turns nodes into values, noting lines and problems in the document."""

    def __init__(self, document: Document, name: str) -> None:
        self._document = document
        self._name = name
        self._open: list[int] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        """Returns the node's value; a node that holds itself or carries a tag is reported and becomes null."""
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in self._open:
            return self._refuse(node, "an alias refers to what contains it.", "Write the value out.")
        self._open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode) and node.tag in _CONSTRUCT:
                return _CONSTRUCT[node.tag](node.value)
            return self._refuse(
                node, f"the tag {_short(node.tag)} is not allowed.", "Remove the tag; write a plain value."
            )
        except (ValueError, OverflowError):
            return self._refuse(
                node, f"{node.value!r} is not a value of the kind that its tag says.", "Remove the tag."
            )
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node, (*path, "?"))
            self._document.lines.pop((*path, "?"), None)
            if not isinstance(key, Hashable):
                self._refuse(key_node, "a key must be a word, not a list or a mapping.", "Quote it if it is text.")
                continue
            key = key if isinstance(key, str) else key_node.value
            inside = (*path, key)
            if key in values:
                first = self._document.lines[inside]
                self._refuse(key_node, f"{dotted(inside)} is set twice (first in line {first}).", "Remove one of them.")
                continue
            self._document.lines[inside] = key_node.start_mark.line + 1
            values[key] = self.value(value_node, inside)
        return values

    def _refuse(self, node: yaml.Node, what: str, fix: str) -> None:
        where = f"{self._name}:{node.start_mark.line + 1}" if self._name else None
        self._document.problems.append(Problem(what, where, fix))


_CONSTRUCT = {
    _NULL: lambda text: None,
    _BOOL: lambda text: text.lower() == "true",
    _INT: lambda text: int(text.replace("_", "")),
    _FLOAT: lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower().replace("_", ""))),
    _STR: str,
}


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def paths(value: Any, root: Path = ()) -> Iterator[Path]:
    """Yields `root` and the path of everything inside its value."""
    yield root
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*root, key))


def dotted(path: Path) -> str:
    """Returns a path as people write it: `data.train[0].path`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
