"""Chat templates: one render of a conversation gives its text and where each message's content stands in it.

A template is a program that may trim, reorder or repeat contents, so the rendered text alone does not tell them from
what the template wrote. Each content is therefore marked before the render: its core (without outer white space) goes
between two private-use characters that carry its number, its outer white space becomes a run of a rare white-space
character, which a template trims or keeps exactly as it would the original. Taking the marks out afterwards gives the
text and every position, in time linear in the conversation.

Marks change what a template sees, so a template that looks into contents (`startswith`, `split`, ...) could render
otherwise. The text that Transformers renders from the unmarked messages is the truth: the first rows of a dataset are
compared with it, and every row if the template does more with contents than print and trim them. Where the two
differ, only the contents that train are marked, and if that does not help, contents are searched for, in order, in
Transformers' text.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from stoker.data import marks
from stoker.data.marks import Rendered, Slot, Turn
from stoker.data.template_engine import only_prints_contents, parse
from stoker.errors import DataError

NAMED = ("alpaca", "chatml", "llama2", "llama3", "mistral")
CHECKED_ROWS = 32


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
        self._looks_like_marks = marks.MARK.search(source) is not None
        self._rows_seen = 0

    @property
    def method(self) -> str:
        """How trained text is found, for the audit."""
        if self.has_generation_tags:
            return "its generation tags"
        return "marks, every row checked" if self._checks_all_rows else "marks"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        roles: Collection[str] | None = None,
    ) -> Rendered:
        """Returns the conversation's text and positions.

        Messages are mappings with `role` and `content`; other keys go to the template as they are. `roles` are those
        whose positions matter most (None: all): if a template trips over marks in other messages, it is tried without.
        Raises DataError (without a place) if the template refuses the conversation or does not print it faithfully.
        """
        if tools and not self._mentions_tools:
            raise DataError(
                "the row has tools, but the chat template does not mention them.",
                fix="Use a chat template with tools, or remove them from the row.",
            )
        plain = [_plain(message) for message in messages]
        self._rows_seen += 1
        stand_ins = marks.stand_ins(plain)
        if self._looks_like_marks or stand_ins is None or not marks.can_be_marked(plain, tools):
            return _search(self._render_plain(plain, tools), plain)
        rendered, slots = self._render_marked(plain, tools, stand_ins, None)
        is_sure = not self._checks_all_rows and self._rows_seen > CHECKED_ROWS
        if is_sure and not stand_ins and all(slot.core for slot in slots):
            return rendered
        truth = self._render_plain(plain, tools)
        if rendered.text != truth and roles is not None:
            rendered, _ = self._render_marked(plain, tools, stand_ins, roles)
        return rendered if rendered.text == truth else _search(truth, plain)

    def _render_marked(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Any] | None,
        stand_ins: dict[str, str],
        roles: Collection[str] | None,
    ) -> tuple[Rendered, list[Slot]]:
        marked, slots = marks.mark(messages, str.maketrans(stand_ins), roles)
        variables = self._variables | ({"tools": list(tools)} if tools else {})
        try:
            text = self._template.render(messages=marked, add_generation_prompt=False, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(error) from error
        rendered = marks.unmark(text, slots, messages)
        if stand_ins:
            back = str.maketrans({stand_in: original for original, stand_in in stand_ins.items()})
            rendered = replace(rendered, text=rendered.text.translate(back))
        return rendered, slots

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


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drops keys without a value and gives reasoning the names under which templates read it, as Transformers does."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in marks.THOUGHT_KEYS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _refused(error: Exception) -> DataError:
    return DataError(f"the chat template refuses this conversation: {error}")


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
