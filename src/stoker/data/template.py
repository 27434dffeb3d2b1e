"""Chat templates: one render of a conversation gives its text and where each message's content stands in it.

A template is a program that may trim, reorder or repeat contents, so the rendered text alone does not tell them from
what the template wrote. Each content is therefore marked before the render: its core (without outer white space) goes
between two private-use characters that carry its number, its outer white space becomes a run of a rare white-space
character, which a template trims or keeps exactly as it would the original. Taking the marks out afterwards gives the
text and every position, in time linear in the conversation.

Marks change what a template sees, so a template that looks into contents (`startswith`, `split`, ...) could render
otherwise. The text that Transformers renders from the unmarked messages is the truth: the first rows of a dataset are
compared with it, and every row if the template does more with contents than print and trim them. What a template of
the first kind prints around contents depends on the roles alone, and is kept (`stoker.data.skeleton`). Where the two
differ, only the contents that train are marked. If that does not help, or if a message calls tools, whose text no
content tells, the template says which text each turn of its loop over the messages prints
(`stoker.data.template_turns`). What cannot be placed with certainty is an error that names the message.
"""

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from stoker.data import marks
from stoker.data.marks import Rendered, Slot
from stoker.data.skeleton import Skeletons
from stoker.data.template_analysis import escapes_contents, only_prints_contents
from stoker.data.template_engine import parse
from stoker.data.template_turns import Turns
from stoker.errors import DataError

NAMED = tuple(
    sorted(
        entry.name.removesuffix(".jinja")
        for entry in resources.files("stoker.data").joinpath("templates").iterdir()
        if entry.name.endswith(".jinja")
    )
)
"""Templates that come with Stoker."""
ALIASES: dict[str, str] = tomllib.loads(
    resources.files("stoker.data").joinpath("templates", "aliases.toml").read_text()
)
"""Other names of models whose format is one of these."""
DEFAULT = "tokenizer_default"
"""The tokenizer's own; with `_fallback_NAME` behind it, that named template if the tokenizer has none."""
FALLBACK = f"{DEFAULT}_fallback_"
CHECKED_ROWS = 32


class ChatTemplate:
    """A compiled chat template of one tokenizer; `render` is its use.

    `source` is Jinja text, `origin` says where it comes from, `variables` are further ones that it reads. Raises
    DataError if it does not compile.
    """

    def __init__(self, source: str, *, origin: str, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self.origin = origin
        self._tokenizer = tokenizer
        self._extra = dict(variables or {})
        self._variables = _template_variables(tokenizer) | self._extra
        try:
            self._template, tree = parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template ({origin}) is not valid Jinja: {error.message}, line {error.lineno}."
            ) from error
        self.has_generation_tags = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._checks_all_rows = not only_prints_contents(tree)
        self._escapes = escapes_contents(tree)
        self._mentions_tools = "tools" in source
        self._looks_like_marks = marks.MARK.search(source) is not None
        self._turns: Turns | None = None
        self._rows_seen = 0
        # Contents are escaped by some, and others print what time it is.
        self._skeletons = None if self._escapes or "strftime_now" in source else Skeletons()

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
        by_tags: bool = False,
    ) -> Rendered:
        """Returns the conversation's text and positions.

        Messages are mappings with `role` and `content`; other keys go to the template as they are. `roles` are those
        whose positions matter (None: all): if a template trips over marks in other messages, it is tried without.
        `by_tags`: only what `{% generation %}` encloses matters.

        Raises DataError (without a place) if the template refuses the conversation, or if it cannot be told where one
        of these messages stands.
        """
        if tools and not self._mentions_tools:
            raise DataError(
                "the row has tools, but the chat template does not mention them.",
                fix="Use a chat template with tools, or remove them from the row.",
            )
        self._rows_seen += 1
        if self._skeletons is not None and not tools and (known := self._skeletons.render(messages)) is not None:
            return known
        plain = [_plain(message) for message in messages]
        calls = () if by_tags else _calls(plain, roles)
        stand_ins = marks.stand_ins(plain)
        if self._looks_like_marks or stand_ins is None or not marks.can_be_marked(plain, tools):
            return self._by_turns(plain, tools, roles, by_tags=by_tags)
        rendered, slots = self._render_marked(plain, tools, stand_ins, None)
        is_sure = not self._checks_all_rows and self._rows_seen > CHECKED_ROWS and not calls and not rendered.uncertain
        if is_sure and not stand_ins and all(map(self._is_plain_slot, slots)):
            if self._skeletons is not None and not tools:
                self._skeletons.learn(messages, rendered)
            return rendered
        truth = self._render_plain(plain, tools)
        if rendered.text != truth and roles is not None:
            rendered, _ = self._render_marked(plain, tools, stand_ins, roles)
        if rendered.text != truth and by_tags:
            rendered, _ = self._render_marked(plain, tools, stand_ins, ())
        if rendered.text != truth or (not by_tags and _is_asked(rendered.uncertain, plain, roles)):
            return self._by_turns(plain, tools, roles, by_tags=by_tags)
        return self.turns.with_calls(rendered, plain, tools, calls) if calls else rendered

    def _is_plain_slot(self, slot: Slot) -> bool:
        """Whether a content's marks can change nothing: it is there, and JSON would not escape its ends."""
        return bool(slot.core) and not (self._escapes and (slot.lead or slot.trail))

    @property
    def turns(self) -> Turns:
        """The template as it tells turns apart, compiled when it is first needed."""
        if self._turns is None:
            self._turns = Turns(self.source, self._variables, self._tokenizer, self._render_plain)
        return self._turns

    def _by_turns(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Any] | None,
        roles: Collection[str] | None,
        *,
        by_tags: bool,
    ) -> Rendered:
        if by_tags:
            raise DataError(
                "the chat template's {% generation %} tags cannot be followed through this row: private-use characters "
                "in it look like theirs.",
                fix="Remove private-use characters (U+F0000 and above) from the row or the template.",
            )
        return self.turns.render(messages, tools, roles, self._render_plain(messages, tools))

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

    def _render_plain(
        self, messages: list[dict[str, Any]], tools: Sequence[Any] | None, *, prompt: bool = False
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **self._extra,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(error) from error


def resolve(tokenizer: Any, template: str | None = None, *, variables: Mapping[str, Any] | None = None) -> ChatTemplate:
    """Returns the template that a choice names: the tokenizer's own (None or `tokenizer_default`), that or a named one
    (`tokenizer_default_fallback_NAME`), a named one, a Jinja file, or Jinja itself.

    Raises DataError if the tokenizer has none, or if `template` is none of these.
    """
    source = source_of(tokenizer, template)
    if source is None:
        raise DataError(
            "the tokenizer has no chat template, and the data is a chat.",
            fix=f"Set model.chat_template to one of {', '.join(NAMED)}, or to a Jinja file.",
        )
    return ChatTemplate(source, origin=_origin(tokenizer, template), tokenizer=tokenizer, variables=variables)


def source_of(tokenizer: Any, template: str | None = None) -> str | None:
    """Returns the Jinja text of what `resolve` would compile; None if the tokenizer has no template of its own."""
    if template is None or template == DEFAULT:
        return _own_source(tokenizer)
    if template.startswith(FALLBACK):
        return _own_source(tokenizer) or source_of(tokenizer, template.removeprefix(FALLBACK))
    name = ALIASES.get(template, template)
    if name in NAMED:
        return resources.files("stoker.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    if is_jinja(template):
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(template, [*NAMED, *ALIASES], 1, 0.6)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise DataError(
            f"model.chat_template = {template!r} is neither a named template nor a file.",
            fix=f"{hint}Use one of {', '.join(NAMED)}, or the path of a Jinja file.",
        )
    return path.read_text(encoding="utf-8")


def is_jinja(template: str) -> bool:
    """Whether a choice is a template itself, and no name."""
    return "{{" in template or "{%" in template


def _origin(tokenizer: Any, template: str | None) -> str:
    if template is None or template == DEFAULT or (template.startswith(FALLBACK) and _own_source(tokenizer)):
        return "the tokenizer's own"
    return "given as Jinja" if is_jinja(template) else template.removeprefix(FALLBACK)


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


def _is_asked(indices: Collection[int], messages: Sequence[Mapping[str, Any]], roles: Collection[str] | None) -> bool:
    """Whether one of the messages has one of the roles."""
    return any(roles is None or messages[index].get("role") in roles for index in indices)


def _calls(messages: Sequence[Mapping[str, Any]], roles: Collection[str] | None) -> tuple[int, ...]:
    """Returns the messages of those roles that call tools."""
    return tuple(
        index
        for index, message in enumerate(messages)
        if message.get("tool_calls") and (roles is None or message.get("role") in roles)
    )


def _refused(error: Exception) -> DataError:
    return DataError(f"the chat template refuses this conversation: {error}")
