"""What a chat template prints for each message, by the turns of its loop over the messages.

This tells what the model writes where contents do not: a message that calls tools, or a template that changes its
contents. The answer of the assistant is what its turn prints after the prompt for an answer (what
`add_generation_prompt` adds). Any other content must stand between what its turn prints around another content in
its place.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from stoker.data.marks import THOUGHT_KEYS, Rendered, Turn
from stoker.data.template_engine import TurnTemplate
from stoker.errors import DataError

Place = tuple[int, int]

_AFTER_USER: list[dict[str, Any]] = [{"role": "user", "content": "-"}]
_CALL = {"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {}}}
_AFTER_TOOL: list[dict[str, Any]] = [
    *_AFTER_USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "f", "tool_call_id": "000000000", "content": "-"},
]


class Turns:
    """A template of one tokenizer that tells turns apart.

    `render_plain(messages, tools, prompt=)` gives Transformers' own text, with the prompt for an answer if asked for.
    """

    def __init__(
        self, source: str, variables: Mapping[str, Any], tokenizer: Any, render_plain: Callable[..., str]
    ) -> None:
        self._template = TurnTemplate(source)
        self._variables = dict(variables)
        self._render_plain = render_plain
        self._prompts: dict[bool, str | None] = {}

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Any] | None,
        roles: Collection[str] | None,
        truth: str,
    ) -> Rendered:
        """Returns the conversation's text and where the messages of `roles` (None: all) stand in it.

        Raises DataError naming the first of them whose place is not certain.
        """
        places = self._places(messages, tools, truth)
        asked = [
            index
            for index, message in enumerate(messages)
            if (roles is None or message.get("role") in roles)
            and (message.get("role") == "assistant" or _says_something(message))
        ]
        around = self._around(messages, tools, asked)
        turns = []
        for index in asked:
            if places[index]:
                turns.append(self._turn(truth, places[index], around.get(index), index, messages))
            elif _says_something(messages[index]):
                _refuse_if_printed(truth, index, messages[index])
        turns.sort(key=lambda turn: turn.start)
        return Rendered(truth, tuple(turns), by_turns=True)

    def with_calls(
        self, rendered: Rendered, messages: list[dict[str, Any]], tools: Sequence[Any] | None, calls: Sequence[int]
    ) -> Rendered:
        """Returns the rendered conversation with the whole turns of the messages that call tools.

        Raises DataError naming the first of them whose place is not certain.
        """
        places = self._places(messages, tools, rendered.text)
        others = [turn for turn in rendered.turns if turn.message not in calls]
        whole = [self._whole(rendered.text, places[index], index, messages) for index in calls]
        turns = sorted([*others, *whole], key=lambda turn: turn.start)
        return replace(rendered, turns=tuple(turns))

    def _places(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None, truth: str) -> list[list[Place]]:
        text, places = self._rendered(messages, tools)
        if text != truth:
            raise DataError(
                "the chat template prints this conversation otherwise when its turns are told apart, so what to train "
                "is not certain.",
                fix="Use a template with {% generation %} tags.",
            )
        return places

    def _rendered(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> tuple[str, list[list[Place]]]:
        variables = self._variables | ({"tools": list(tools)} if tools else {})
        try:
            return self._template.render(messages, add_generation_prompt=False, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error

    def _turn(
        self, text: str, places: list[Place], around: tuple[str, str] | None, index: int, messages: list[dict[str, Any]]
    ) -> Turn:
        """Returns the place of a content that stands where it must; else an assistant's whole turn.

        An answer must begin where its prompt ends; any other content must stand between what the template prints
        `around` another content in its place.
        """
        message = messages[index]
        role, content = str(message.get("role")), message.get("content")
        says_more = message.get("tool_calls") or any(key in message for key in THOUGHT_KEYS) or "think>" in str(content)
        if isinstance(content, str) and content.strip() and not says_more and len(places) == 1:
            start, end = places[0]
            if around and text.startswith(around[0], start) and text.endswith(around[1], start, end):
                first, last = start + len(around[0]), end - len(around[1])
                # All that stands there is what the template makes of the content.
                return Turn(index, role, *(_content(text, content, first, last, whole=True) or (first, last)))
            first = self._after_prompt(text, start, index, messages) if role == "assistant" else None
            found = None if first is None else _content(text, content, first, end)
            if first is not None and found is not None and not _has_moved_space(text, content, first, found):
                return Turn(index, role, *found)
        if role != "assistant":
            raise _uncertain(index, message, "changes the content of")
        return self._whole(text, places, index, messages)

    def _around(
        self, messages: list[dict[str, Any]], tools: Sequence[Any] | None, asked: Collection[int]
    ) -> dict[int, tuple[str, str]]:
        """Returns what the template prints before and behind contents of the messages, seen with others in their place.

        One render for all; answers, and messages of which it does not tell, are left out.
        """
        words = {index: f"probe{index}x" for index in asked if messages[index].get("role") != "assistant"}
        if not words:
            return {}
        probed = [
            message | {"content": words[index]} if index in words else dict(message)
            for index, message in enumerate(messages)
        ]
        try:
            text, places = self._rendered(probed, tools)
        except DataError:  # the template wants something of its contents
            return {}
        found = {}
        for index, word in words.items():
            if len(places[index]) == 1:
                start, end = places[index][0]
                before, is_there, behind = text[start:end].partition(word)
                if is_there and word not in behind:
                    found[index] = (before, behind)
        return found

    def _whole(self, text: str, places: list[Place], index: int, messages: list[dict[str, Any]]) -> Turn:
        """Returns what the turn prints after the prompt for an answer, which stands in it or right before it."""
        message = messages[index]
        if len(places) != 1:
            raise _uncertain(index, message, "does not print in one place" if places else "leaves out")
        start, end = places[0]
        end = start + len(text[start:end].rstrip())  # a line break between turns is no one's
        first = self._after_prompt(text, start, index, messages)
        if first is not None and first < end:
            return Turn(index, str(message.get("role")), first, end, whole=True)
        raise _uncertain(index, message, "does not print after its prompt for an answer")

    def _after_prompt(self, text: str, start: int, index: int, messages: list[dict[str, Any]]) -> int | None:
        """Returns where the prompt for an answer ends, which stands at the beginning of a turn or right before it."""
        prompt = self._answer_prompt(after_tool=index > 0 and messages[index - 1].get("role") == "tool")
        if prompt is None:
            return None
        if text.startswith(prompt, start):
            return start + len(prompt)
        return start if text.endswith(prompt, 0, start) else None

    def _answer_prompt(self, *, after_tool: bool) -> str | None:
        """Returns what the template adds to ask for an answer to a user or to a tool; None if it does not say."""
        if after_tool not in self._prompts:
            self._prompts[after_tool] = self._prompt_after(_AFTER_TOOL if after_tool else _AFTER_USER)
            if after_tool and self._prompts[True] is None:
                self._prompts[True] = self._answer_prompt(after_tool=False)
        return self._prompts[after_tool]

    def _prompt_after(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            without, asked = (self._render_plain(messages, None, prompt=prompt) for prompt in (False, True))
        except DataError:  # a template that takes no such conversation has nothing to say here
            return None
        return asked.removeprefix(without) if asked.startswith(without) else None


def _content(text: str, content: str, first: int, last: int, *, whole: bool = False) -> Place | None:
    """Returns where a content stands that begins at `first` (and ends at `last` if `whole`), white space aside.

    None if it does not.
    """
    core = content.strip()
    start = first + len(text[first:last]) - len(text[first:last].lstrip())
    stop = start + len(core)
    if not text.startswith(core, start) or stop > last or (whole and text[stop:last].strip()):
        return None
    lead, trail = content[: content.find(core)], content[content.find(core) + len(core) :]
    stop += len(trail) if text.startswith(trail, stop) and stop + len(trail) <= last else 0
    return (start - len(lead) if text.endswith(lead, first, start) else start, stop)


def _has_moved_space(text: str, content: str, first: int, found: Place) -> bool:
    """Whether white space stands before a content that has lost some behind: a template may have turned it around."""
    trail = content[len(content.rstrip()) :]
    return bool(trail) and text[first : found[0]].isspace() and not text.endswith(trail, *found)


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or (isinstance(content, str) and bool(content.strip()))


def _refuse_if_printed(text: str, index: int, message: Mapping[str, Any]) -> None:
    """A message that no turn prints is left out, unless its content stands somewhere: then where is not certain."""
    content = message.get("content")
    if message.get("tool_calls") or (isinstance(content, str) and content.strip() in text):
        raise _uncertain(index, message, "does not print in its loop")


def _uncertain(index: int, message: Mapping[str, Any], how: str) -> DataError:
    return DataError(
        f"the chat template {how} message {index} ({message.get('role')}), so what to train in the rendered text is "
        "not certain.",
        fix="Use a template with {% generation %} tags, or change the message.",
    )
