"""What a chat template prints for each message, by the turns of its loop over the messages.

This tells what the model writes where contents do not: a message that calls tools, or a template that changes its
contents. The answer of the assistant is what its turn prints after the prompt for an answer (what
`add_generation_prompt` adds); any other content must stand exactly once in what its turn prints.
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
        self._source = source
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
        turns = []
        for index, message in enumerate(messages):
            is_asked = roles is None or message.get("role") in roles
            if not is_asked or (message.get("role") != "assistant" and not _says_something(message)):
                continue
            if not places[index]:
                if _says_something(message):
                    _refuse_if_printed(truth, index, message)
                continue
            turns.append(self._turn(truth, places[index], index, messages))
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
        variables = self._variables | ({"tools": list(tools)} if tools else {})
        try:
            text, places = self._template.render(messages, add_generation_prompt=False, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        if text != truth:
            raise DataError(
                "the chat template prints this conversation otherwise when its turns are told apart, so what to train "
                "is not certain.",
                fix="Use a template with {% generation %} tags.",
            )
        return places

    def _turn(self, text: str, places: list[Place], index: int, messages: list[dict[str, Any]]) -> Turn:
        """Returns the place of a content that stands exactly once in its turn; else an assistant's whole turn."""
        message = messages[index]
        role, content = str(message.get("role")), message.get("content")
        says_more = message.get("tool_calls") or any(key in message for key in THOUGHT_KEYS) or "think>" in str(content)
        if isinstance(content, str) and content.strip() and not says_more and len(places) == 1:
            start, end = places[0]
            first = self._after_prompt(text, start, index, messages) if role == "assistant" else None
            found = self._content(text, content, start if first is None else first, end, known_start=first is not None)
            if found is not None:
                return Turn(index, role, *found)
        if role != "assistant":
            raise _uncertain(index, message, "changes the content of")
        return self._whole(text, places, index, messages)

    def _content(self, text: str, content: str, start: int, end: int, *, known_start: bool) -> Place | None:
        """Returns where a content stands in `text[start:end]`, None if that is not certain.

        Unless the answer is known to begin there (`known_start`), what stands there may be the template's own text.
        """
        core = content.strip()
        found = text.find(core, start, end)
        if found < 0 or text.find(core, found + 1, end) >= 0 or (not known_start and core in self._source):
            return None
        lead, trail = content[: content.find(core)], content[content.find(core) + len(core) :]
        stop = found + len(core)
        stop += len(trail) if text.startswith(trail, stop) and stop + len(trail) <= end else 0
        keeps_lead = known_start and text.endswith(lead, start, found)
        return (found - len(lead) if keeps_lead else found, stop)

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
