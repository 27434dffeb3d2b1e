"""Chat templates: one render of a conversation gives its text and where each message's content stands in it.

A template is a program that may trim, reorder or repeat contents, so the rendered text alone does not tell them from
what the template wrote. Each content is therefore marked before the render: its core (without outer white space) goes
between two private-use characters that carry its number, its outer white space becomes a run of a rare white-space
character, which a template trims or keeps exactly as it would the original. Taking the marks out afterwards gives the
text and every position, in time linear in the conversation.

Marks change what a template sees, so a template that looks into contents (`startswith`, `split`, ...) could render
otherwise. The text that Transformers renders from the unmarked messages is the truth: the first rows of a dataset are
compared with it, and every row if the template does more with contents than print and trim them. Where the two
differ, contents are searched for, in order, in Transformers' text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from stoker.data.template_engine import GENERATED_CLOSE, GENERATED_OPEN, only_prints_contents, parse
from stoker.errors import DataError

NAMED = ("alpaca", "chatml", "llama2", "llama3", "mistral")
CHECKED_ROWS = 32

_MARKED_KEYS = ("reasoning_content", "thinking", "reasoning", "instruction", "input", "content")
_OPEN, _CLOSE, _MAX_SLOTS = 0xF0000, 0x100000, 0xFF00
_SPACE = "\u205f"
_RESERVED = re.compile("[\U000f0000-\U0010ffff]")
_MARKS = re.compile(
    f"(?P<lead>{_SPACE}*)(?P<open>[\U000f0000-\U000fffff])"
    f"|(?P<close>[\U00100000-\U0010feff])(?P<trail>{_SPACE}*)"
    f"|{GENERATED_OPEN}|{GENERATED_CLOSE}"
)


@dataclass(frozen=True)
class Turn:
    """The content of message number `message` stands at `text[start:end]`."""

    message: int
    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, where its contents are (in the text's order), and what `{% generation %}` encloses.

    `searched`: the contents were searched for, because marking would have changed the text.
    """

    text: str
    turns: tuple[Turn, ...]
    generated: tuple[tuple[int, int], ...] = ()
    searched: bool = False


@dataclass(frozen=True)
class _Slot:
    """One marked string of a message: outer white space and core."""

    message: int
    lead: str
    core: str
    trail: str


class ChatTemplate:
    """A compiled chat template of one tokenizer; `render` is its use.

    `source` is Jinja text, `origin` says where it comes from. Raises DataError if it does not compile.
    """

    def __init__(self, source: str, *, origin: str, tokenizer: Any) -> None:
        self.source = source
        self.origin = origin
        self._tokenizer = tokenizer
        self._variables = _template_variables(tokenizer)
        try:
            self._template, tree = parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template ({origin}) is not valid Jinja: {error.message}, line {error.lineno}."
            ) from error
        self.has_generation_tags = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._checks_all_rows = not only_prints_contents(tree)
        self._mentions_tools = "tools" in source
        self._rows_seen = 0

    @property
    def method(self) -> str:
        """How trained text is found, for the audit."""
        if self.has_generation_tags:
            return "its generation tags"
        return "marks, every row checked" if self._checks_all_rows else "marks"

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None) -> Rendered:
        """Returns the conversation's text and positions.

        Messages are mappings with `role` and `content`; other keys go to the template as they are. Raises DataError
        (without a place) if the template refuses the conversation or does not print it faithfully.
        """
        if tools and not self._mentions_tools:
            raise DataError(
                "the row has tools, but the chat template does not mention them.",
                fix="Use a chat template with tools, or remove them from the row.",
            )
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        self._rows_seen += 1
        marked, slots = _mark(plain)
        if marked is None:
            return _search(self._render_plain(plain, tools), plain)
        marked_text = self._render_marked(marked, tools)
        rendered = _unmark(marked_text, slots, plain)
        if self._checks_all_rows or self._rows_seen <= CHECKED_ROWS or any(not slot.core for slot in slots):
            truth = self._render_plain(plain, tools)
            if truth != rendered.text:
                return _search(truth, plain)
        return rendered

    def _render_marked(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> str:
        variables = self._variables | ({"tools": list(tools)} if tools else {})
        try:
            return self._template.render(messages=messages, add_generation_prompt=False, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(error) from error

    def _render_plain(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=list(tools) if tools else None, chat_template=self.source, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(error) from error


def resolve(tokenizer: Any, template: str | None = None) -> ChatTemplate:
    """Returns the tokenizer's own template (None), a named one, or the one in a Jinja file.

    Raises DataError if the tokenizer has none, or if `template` is neither a name of `NAMED` nor a file.
    """
    source = source_of(tokenizer, template)
    if source is None:
        raise DataError(
            "the tokenizer has no chat template, and the data is a chat.",
            fix=f"Set model.chat_template to one of {', '.join(NAMED)}, or to a Jinja file.",
        )
    return ChatTemplate(source, origin=template or "the tokenizer's own", tokenizer=tokenizer)


def source_of(tokenizer: Any, template: str | None = None) -> str | None:
    """Returns the Jinja text of what `resolve` would compile; None if the tokenizer has no template of its own."""
    if template is None:
        return _own_source(tokenizer)
    if template in NAMED:
        return resources.files("stoker.data").joinpath("templates", f"{template}.jinja").read_text(encoding="utf-8")
    path = Path(template).expanduser()
    if not path.is_file():
        raise DataError(
            f"model.chat_template = {template!r} is neither a named template nor a file.",
            fix=f"Use one of {', '.join(NAMED)}, or the path of a Jinja file.",
        )
    return path.read_text(encoding="utf-8")


def _own_source(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return template.get("default")
    return template or None


def _template_variables(tokenizer: Any) -> dict[str, Any]:
    """Returns the variables a template sees besides the messages, as this version of Transformers passes them."""
    # Transformers has passed a missing `tools` as None and as an empty list; Llama 3.1's template tells them apart.
    probe = [{"role": "user", "content": "-"}]
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    for name in ("tools", "documents"):
        source = f"{{{{ {name} is none }}}}"
        is_none = tokenizer.apply_chat_template(probe, chat_template=source, tokenize=False) == "True"
        variables[name] = None if is_none else []
    return variables


def _refused(error: Exception) -> DataError:
    return DataError(f"the chat template refuses this conversation: {error}")


def _mark(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]] | None, list[_Slot]]:
    """Returns copies of the messages with marked contents, and the slots; None if a text holds marks already."""
    marked, slots = [], []
    for index, message in enumerate(messages):
        copy = dict(message)
        for key in _MARKED_KEYS:
            text = message.get(key)
            if not isinstance(text, str) or (not text and key != "content"):
                continue
            if not text.isascii() and _RESERVED.search(text):
                return None, []
            core = text.strip()
            start = text.find(core) if core else 0
            slot = _Slot(index, text[:start], core, text[start + len(core) :])
            number = len(slots)
            copy[key] = "".join(
                (_SPACE * len(slot.lead), chr(_OPEN + number), core, chr(_CLOSE + number), _SPACE * len(slot.trail))
            )
            slots.append(slot)
        marked.append(copy)
    return (marked, slots) if len(slots) < _MAX_SLOTS else (None, [])


def _unmark(marked: str, slots: list[_Slot], messages: list[dict[str, Any]]) -> Rendered:
    """Takes the marks out of a rendered text, restores outer white space and notes where everything stands."""
    pieces: list[str] = []
    length = position = 0
    opened: dict[int, int] = {}
    spans: list[tuple[int, int | None, int | None]] = []  # slot, start, end; None where the template cut a mark off
    generated: list[tuple[int, int]] = []
    generation_start = 0
    for mark in _MARKS.finditer(marked):
        piece = marked[position : mark.start()]
        position = mark.end()
        pieces.append(piece)
        length += len(piece)
        if mark["open"]:
            number = ord(mark["open"]) - _OPEN
            kept = len(mark["lead"])
            pieces.append(slots[number].lead[len(slots[number].lead) - kept :])
            opened[number] = length
            length += kept
        elif mark["close"]:
            number = ord(mark["close"]) - _CLOSE
            trail = slots[number].trail[: len(mark["trail"])]
            pieces.append(trail)
            length += len(trail)
            spans.append((number, opened.pop(number, None), length))
        elif mark[0] == GENERATED_OPEN:
            generation_start = length
        else:
            generated.append((generation_start, length))
    pieces.append(marked[position:])
    text = "".join(pieces)
    spans.extend((number, start, None) for number, start in opened.items())
    return Rendered(text, _turns(text, spans, slots, messages), tuple(generated))


def _turns(
    text: str,
    spans: list[tuple[int, int | None, int | None]],
    slots: list[_Slot],
    messages: list[dict[str, Any]],
) -> tuple[Turn, ...]:
    """Joins the spans of each message that follow one another (reasoning and answer) into one turn."""
    whole = sorted(
        (*_repaired(text, start, end, slots[number].core), slots[number].message) for number, start, end in spans
    )
    turns: list[Turn] = []
    for start, end, message in whole:
        if turns and turns[-1].message == message:
            turns[-1] = replace(turns[-1], end=max(end, turns[-1].end))
        else:
            turns.append(Turn(message, str(messages[message].get("role")), start, end))
    return tuple(turns)


def _repaired(text: str, start: int | None, end: int | None, core: str) -> tuple[int, int]:
    """Finds the end of a span whose mark the template cut off, as it does with thoughts before the answer."""
    if start is None:
        assert end is not None
        return end - _common_suffix(text, end, core), end
    return start, start + _common_prefix(text, start, core) if end is None else end


def _common_suffix(text: str, end: int, core: str) -> int:
    """Returns how much of the end of `core` stands before `text[end]`; a part of it is taken without leading space."""
    count = 0
    while count < len(core) and count < end and text[end - 1 - count] == core[-1 - count]:
        count += 1
    if count < len(core):
        count = len(core[len(core) - count :].lstrip())
    return count


def _common_prefix(text: str, start: int, core: str) -> int:
    """Returns how much of the beginning of `core` stands at `text[start]`; a part is taken without trailing space."""
    count = 0
    while count < len(core) and start + count < len(text) and text[start + count] == core[count]:
        count += 1
    return count if count == len(core) else len(core[:count].rstrip())


def _search(text: str, messages: list[dict[str, Any]]) -> Rendered:
    """Finds the contents in their order in a text rendered without marks."""
    turns: list[Turn] = []
    position = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            continue
        core = content.strip()
        start = text.find(core, position)
        if start < 0:
            raise DataError(
                f"the chat template changes the content of message {index} ({message.get('role')}), so what to train "
                "in the rendered text is not certain.",
                fix="Use a template with {% generation %} tags, or change the content.",
            )
        trail = content[content.find(core) + len(core) :]
        position = start + len(core)
        position += len(trail) if text.startswith(trail, position) else 0
        turns.append(Turn(index, str(message.get("role")), start, position))
    return Rendered(text, tuple(turns), searched=True)
