"""The Jinja environment of chat templates, as Transformers sets it up, with `{% generation %}` rendered as marks."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

GENERATED_OPEN, GENERATED_CLOSE = "\U0010fff0", "\U0010fff1"

# Lone surrogates: no text that can be tokenised holds one, so these marks meet no character of a row or a template.
_TURN, _LOOP_END = "\ud800", "\ud801"
_TURN_MARK = re.compile("\ud800([\udc00-\uddff])([\udc00-\uddff])([\ude00-\udfff])|\ud801([\ude00-\udfff])")
_BASE, _MAX_LOOPS = 512, 512
_FUNCTION = "stoker_turn"


class _Generation(Extension):
    """Encloses the output of `{% generation %} ... {% endgeneration %}` in two private-use characters."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Any) -> nodes.Node:
        """Reads the block and wraps it into a call of `_enclose`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Any) -> str:
        return GENERATED_OPEN + caller() + GENERATED_CLOSE


class _Untagged(_Generation):
    """Leaves what `{% generation %}` encloses as it is."""

    def _enclose(self, caller: Any) -> str:
        return caller()


def parse(source: str) -> tuple[jinja2.Template, nodes.Template]:
    """Returns the compiled template and its syntax tree. Raises jinja2.TemplateSyntaxError."""
    environment = _environment()
    return environment.from_string(source), environment.parse(source)


class TurnTemplate:
    """A template that also tells which of its text each message's turn of a loop printed.

    Every loop over plain names begins each turn with a mark, made by a function that knows the messages by identity:
    loops over anything else print nothing more. The marks are put between the nodes of the parsed template, so that
    white-space control, which acts on the source, sees what it always sees.
    """

    def __init__(self, source: str) -> None:
        environment = _environment(_Untagged)
        tree = environment.parse(source)
        _mark_loops(tree)
        code = environment.compile(tree)
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> tuple[str, list[list[tuple[int, int]]]]:
        """Returns the text, and for each message the places `(start, end)` that turns of loops printed for it.

        Places without text are left out. Raises what Jinja raises.
        """
        numbers = {id(message): number for number, message in enumerate(messages)}

        def mark(loop: int, message: Any = None, *, end: bool = False) -> str:
            if end:
                return _LOOP_END + chr(0xDE00 + loop)
            number = numbers.get(id(message))
            if number is None or number >= _BASE * _BASE:
                return ""
            return f"{_TURN}{chr(0xDC00 + number // _BASE)}{chr(0xDC00 + number % _BASE)}{chr(0xDE00 + loop)}"

        marked = self._template.render(messages=messages, **{_FUNCTION: mark}, **variables)
        return _placed(marked, len(messages))


def _placed(marked: str, num_messages: int) -> tuple[str, list[list[tuple[int, int]]]]:
    """Takes the marks out and notes what stands between them."""
    pieces: list[str] = []
    places: list[list[tuple[int, int]]] = [[] for _ in range(num_messages)]
    open_turns: dict[str, tuple[int, int]] = {}  # loop -> message and where its turn began
    length = position = 0
    for mark in _TURN_MARK.finditer(marked):
        pieces.append(marked[position : mark.start()])
        length += mark.start() - position
        position = mark.end()
        loop = mark[3] or mark[4]
        if loop in open_turns:
            message, start = open_turns.pop(loop)
            if length > start:
                places[message].append((start, length))
        if mark[3]:
            open_turns[loop] = ((ord(mark[1]) - 0xDC00) * _BASE + ord(mark[2]) - 0xDC00, length)
    pieces.append(marked[position:])
    return "".join(pieces), places


def _mark_loops(tree: nodes.Template) -> None:
    """Puts a mark at the beginning of each turn of a loop, and one behind the loop."""
    count = 0
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for _, value in parent.iter_fields():
            if not isinstance(value, list) or not any(isinstance(node, nodes.For) for node in value):
                continue
            marked: list[nodes.Node] = []
            for node in value:
                marked.append(node)
                if isinstance(node, nodes.For) and isinstance(node.target, nodes.Name) and count < _MAX_LOOPS:
                    node.body.insert(0, _call(count, [nodes.Name(node.target.name, "load")], []))
                    marked.append(_call(count, [], [nodes.Keyword("end", nodes.Const(True))]))
                    count += 1
            value[:] = marked


def _call(loop: int, arguments: list[nodes.Expr], keywords: list[nodes.Keyword]) -> nodes.Node:
    function = nodes.Name(_FUNCTION, "load")
    call = nodes.Call(function, [nodes.Const(loop), *arguments], keywords, None, None)
    return nodes.Output([call]).set_lineno(1)


def _environment(generation: type[_Generation] = _Generation) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes for HTML, which no chat template means."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
