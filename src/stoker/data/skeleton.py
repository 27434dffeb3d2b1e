"""What a chat template prints around the contents of conversations that are built alike.

A template that only prints contents writes the same text around them whenever roles and outer white space are the same:
what it wrote once is filled with other contents, without a render. `stoker.data.template` says of which templates and
rows that is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stoker.data.marks import MARK, Rendered, Turn

_KEYS = {"role", "content"}
_MAX_MESSAGES = 64
_MAX_SKELETONS = 1024

Build = tuple[tuple[str, int, int], ...]
"""Of each message its role, and how much white space its content has before and behind."""


@dataclass(frozen=True)
class Slot:
    """The content of message number `message`, without as much of its ends, and the text behind it."""

    message: int
    role: str
    before: int
    after: int
    behind: str


@dataclass(frozen=True)
class Skeleton:
    """The text before the first content, and what follows.

    `generated` holds both ends of each `{% generation %}` block: contents before it, and characters of the text around
    contents before it.
    """

    first: str
    slots: tuple[Slot, ...]
    generated: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    def filled(self, contents: Sequence[str]) -> Rendered:
        """Returns the conversation with these contents, one for each message."""
        pieces, turns, place = [self.first], [], len(self.first)
        lengths = [0]  # of so many contents together
        for slot in self.slots:
            content = contents[slot.message]
            if slot.before or slot.after:
                content = content[slot.before : len(content) - slot.after]
            end = place + len(content)
            turns.append(Turn(slot.message, slot.role, place, end))
            lengths.append(lengths[-1] + end - place)
            pieces += (content, slot.behind)
            place = end + len(slot.behind)
        generated = tuple([(lengths[a] + start, lengths[b] + end) for (a, start), (b, end) in self.generated])
        return Rendered("".join(pieces), tuple(turns), generated)


class Skeletons:
    """The skeletons of one template, by how a conversation is built."""

    def __init__(self) -> None:
        self._known: dict[Build, Skeleton] = {}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Rendered | None:
        """Returns the conversation, None if its like was not seen or if it is not plain enough."""
        build = _build(messages)
        skeleton = None if build is None else self._known.get(build)
        return None if skeleton is None else skeleton.filled([message["content"] for message in messages])

    def learn(self, messages: Sequence[Mapping[str, Any]], rendered: Rendered) -> None:
        """Keeps what stands around the contents of a rendered conversation, if each content stands in it once."""
        build = _build(messages)
        if build is None or len(messages) > _MAX_MESSAGES or len(self._known) >= _MAX_SKELETONS:
            return
        skeleton = _skeleton([message["content"] for message in messages], build, rendered)
        if skeleton is not None:
            self._known[build] = skeleton


def _build(messages: Sequence[Mapping[str, Any]]) -> Build | None:
    """Returns how a conversation is built, None if messages hold more than role and content, or are treated apart.

    That is what holds nothing, thoughts, which templates may take out, or characters that look like marks.
    """
    build = []
    for message in messages:
        if message.keys() != _KEYS:
            return None
        text = message["content"]
        if not isinstance(text, str) or "think>" in text or not (text.isascii() or MARK.search(text) is None):
            return None
        core = text.strip()
        if not core:
            return None
        before = 0 if core is text else len(text) - len(text.lstrip())
        build.append((message["role"], before, len(text) - before - len(core)))
    return tuple(build)


def _skeleton(contents: Sequence[str], build: Build, rendered: Rendered) -> Skeleton | None:
    text, turns = rendered.text, rendered.turns
    if rendered.uncertain or rendered.by_turns or len({turn.message for turn in turns}) < len(turns):
        return None
    starts = [*(turn.start for turn in turns[1:]), len(text)]
    slots = []
    for turn, start in zip(turns, starts, strict=True):
        printed, (_, lead, trail) = text[turn.start : turn.end], build[turn.message]
        before = lead - (len(printed) - len(printed.lstrip()))
        after = trail - (len(printed) - len(printed.rstrip()))
        slots.append(Slot(turn.message, turn.role, before, after, text[turn.end : start]))
        if before < 0 or after < 0:
            return None
    generated = [(_within(start, turns), _within(end, turns)) for start, end in rendered.generated]
    skeleton = Skeleton(text[: turns[0].start] if turns else text, tuple(slots), tuple(generated))
    return skeleton if skeleton.filled(contents) == rendered else None


def _within(place: int, turns: Sequence[Turn]) -> tuple[int, int]:
    """Returns how many contents end before a place, and how many characters before it belong to none."""
    before = [turn for turn in turns if turn.end <= place]
    return len(before), place - sum(turn.end - turn.start for turn in before)
