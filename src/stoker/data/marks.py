"""Marks that follow contents through a chat template's render (`stoker.data.template` says why and how).

A content's core stands between two private-use characters that carry its number: U+F0000 + n before, U+100000 + n
behind; U+F8000 + n stands where templates that cut thoughts out may begin with it. Runs of two rare white-space
characters stand for the white space around it.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stoker.data.template_engine import GENERATED_CLOSE, GENERATED_OPEN

THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
_MARKED_KEYS = (*THOUGHT_KEYS, "instruction", "input", "content")
_MARKED = frozenset(_MARKED_KEYS)
_OPEN, _WITHIN, _CLOSE, _MAX_SLOTS = 0xF0000, 0xF8000, 0x100000, 0x8000
# Rare white space that stands for what surrounds a core: one for before, one for after, so that neighbours stay apart.
_LEAD, _TRAIL = "\u205f", "\u2007"
# Templates cut thoughts out of contents or print them anew, so what follows such a tag is marked as a beginning too,
# and so is a closing tag, which may be all that is left of what stood before it.
_THOUGHT = re.compile(r"\s*<(/?)think>\s*")
_ENOUGH = 64
"""Characters that tell one place in a content from another."""
MARK = re.compile("([\U000f0000-\U0010ffff])")


@dataclass(frozen=True)
class Turn:
    """The content of message number `message` stands at `text[start:end]`.

    `whole`: it is all that the template prints for the message after the prompt for an answer, its end included.
    """

    message: int
    role: str
    start: int
    end: int
    whole: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, where its contents are (in the text's order), and what `{% generation %}` encloses.

    `by_turns`: positions come from what the template prints for each message, because marks in the contents would have
    changed the text. `uncertain`: messages of whose marks the template left one only, as it cut a part off.
    """

    text: str
    turns: tuple[Turn, ...]
    generated: tuple[tuple[int, int], ...] = ()
    by_turns: bool = False
    uncertain: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Slot:
    """One marked string of a message: outer white space and core."""

    message: int
    lead: str
    core: str
    trail: str
    thinks: bool = False


def can_be_marked(messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> bool:
    """Whether there are numbers enough, and no private-use characters where they cannot be replaced for the render."""
    others = [
        {key: value for key, value in message.items() if key not in _MARKED and key != "role"} for message in messages
    ]
    if tools or any(others):
        text = json.dumps([others, tools], ensure_ascii=False, default=str)
        if MARK.search(text):
            return False
    if len(messages) * len(_MARKED_KEYS) >= _MAX_SLOTS:
        num_slots = sum(key in message for message in messages for key in _MARKED_KEYS)
        if num_slots >= _MAX_SLOTS:
            return False
    return not any(MARK.search(str(role)) for role in {str(message.get("role")) for message in messages})


def stand_ins(messages: list[dict[str, Any]]) -> dict[str, str] | None:
    """Returns what stands in, during the render, for characters of the contents that look like marks (icon fonts).

    None if there are too many of them.
    """
    texts = [
        text
        for message in messages
        for key, text in message.items()
        if key in _MARKED and isinstance(text, str) and not text.isascii()
    ]
    reserved = {character for text in texts for character in MARK.findall(text)}
    if not reserved:
        return {}
    used = set("".join(texts))
    free = [chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used]
    return dict(zip(sorted(reserved), free, strict=False)) if len(reserved) <= len(free) else None


def mark(
    messages: list[dict[str, Any]], stand_ins: Mapping[int, str], roles: Collection[str] | None
) -> tuple[list[dict[str, Any]], list[Slot]]:
    """Returns copies of the messages, with the contents of `roles` (None: all) marked, and the slots."""
    marked, slots = [], []
    for index, message in enumerate(messages):
        copy = dict(message)
        for key, text in message.items():
            if key not in _MARKED or not isinstance(text, str):
                continue
            if not text and (key != "content" or message.get("tool_calls")):
                continue  # templates ask whether a call of tools says something besides
            text = text.translate(stand_ins) if stand_ins else text  # noqa: PLW2901 - the same text, safe for marks
            copy[key] = text
            if roles is None or message.get("role") in roles:
                core = text.strip()
                start = text.find(core) if core else 0
                thinks = "think>" in core or key in THOUGHT_KEYS
                slot = Slot(index, text[:start], core, text[start + len(core) :], thinks)
                number = len(slots)
                opening, within, closing = (chr(first + number) for first in (_OPEN, _WITHIN, _CLOSE))
                if "think>" in core:
                    core = _THOUGHT.sub(lambda tag, o=within: f"{o if tag[1] else ''}{tag[0]}{o}", core)
                copy[key] = f"{_LEAD * len(slot.lead)}{opening}{core}{closing}{_TRAIL * len(slot.trail)}"
                slots.append(slot)
        marked.append(copy)
    return marked, slots


def unmark(marked: str, slots: list[Slot], messages: list[dict[str, Any]]) -> Rendered:
    """Takes the marks out of a rendered text, restores outer white space and notes where everything stands."""
    first, *rest = MARK.split(marked)
    pieces, length = [first], len(first)
    opened: dict[int, int] = {}
    spans: list[tuple[int, int, int]] = []  # slot, start, end
    torn: set[int] = set()  # slots of which the template cut a mark off, or turned the two around
    generated: list[tuple[int, int]] = []
    generation_start = 0
    for mark, following in zip(rest[::2], rest[1::2], strict=True):
        piece = following
        if mark == GENERATED_OPEN:
            generation_start = length
        elif mark == GENERATED_CLOSE:
            generated.append((generation_start, length))
        elif ord(mark) < _WITHIN:
            number = ord(mark) - _OPEN
            if number not in opened:
                opened[number] = length - _kept_lead(pieces, slots[number].lead)
        elif ord(mark) < _CLOSE:
            number = ord(mark) - _WITHIN
            if number not in opened:
                opened[number] = length
                if _may_begin_before("".join(pieces[-4:])[-_ENOUGH:], piece, slots[number].core):
                    torn.add(number)
        else:
            number = ord(mark) - _CLOSE
            trail = min(len(piece) - len(piece.lstrip(_TRAIL)), len(slots[number].trail))
            piece = slots[number].trail[:trail] + piece[trail:]
            if number in opened:
                spans.append((number, opened.pop(number), length + trail))
            else:
                torn.add(number)
        pieces.append(piece)
        length += len(piece)
    text = "".join(pieces)
    uncertain = frozenset(slots[number].message for number in (*torn, *opened))
    return Rendered(text, _turns(text, spans, slots, messages), tuple(generated), uncertain=uncertain)


def _kept_lead(pieces: list[str], lead: str) -> int:
    """Restores the leading white space that the template kept, at the end of the pieces; returns how much it is."""
    last = pieces[-1]
    kept = min(len(last) - len(last.rstrip(_LEAD)), len(lead))
    if kept:
        pieces[-1] = last[:-kept] + lead[-kept:]
    return kept


def _may_begin_before(before: str, behind: str, core: str) -> bool:
    """Whether more of a content may stand before the first of its marks, which stands at a thought's tag.

    `before` and `behind` are the rendered text around that mark. A template that cuts a thought out leaves none of it;
    one that cuts elsewhere leaves what stands before the mark in the content too.
    """
    before, known = before.rstrip(), behind.strip()[:_ENOUGH]
    for tag in _THOUGHT.finditer(core):
        for place in (tag.start(), tag.end()) if tag[1] else (tag.end(),):
            if not core[place:].lstrip().startswith(known):
                continue
            in_content, in_text = core[:place].rstrip(), before
            for name in ("<think>", "</think>"):
                if in_content.endswith(name):
                    in_content = in_content.removesuffix(name)
                    in_text = in_text.removesuffix(name) if in_text.endswith(name) else ""
                    if name == "<think>" and _share_white_space(in_content, in_text):
                        return True
                    in_content, in_text = in_content.rstrip(), in_text.rstrip()
                    break
            if in_content and in_text and in_content[-1] == in_text[-1]:
                return True
    return False


def _share_white_space(in_content: str, in_text: str) -> bool:
    """Whether white space in the text may be the content's, all before it having been cut off."""
    return bool(in_content.strip()) and in_content[-1].isspace() and in_text.endswith(in_content[-1])


def _turns(
    text: str, spans: list[tuple[int, int, int]], slots: list[Slot], messages: list[dict[str, Any]]
) -> tuple[Turn, ...]:
    """Joins the spans of each message that follow one another (reasoning and answer) into one turn."""
    whole = sorted((_opened_thought(text, start, slots[slot]), end, slots[slot].message) for slot, start, end in spans)
    turns: list[Turn] = []
    for start, end, message in whole:
        if turns and turns[-1].message == message:
            turns[-1] = replace(turns[-1], end=max(end, turns[-1].end))
        else:
            turns.append(Turn(message, str(messages[message].get("role")), start, end))
    return tuple(turns)


def _opened_thought(text: str, start: int, slot: Slot) -> int:
    """Returns where a span begins: a thought takes in the tag that opens it."""
    if slot.thinks:
        before = text[:start].rstrip() if start < 32 else text[start - 32 : start].rstrip()
        if before.endswith("<think>"):
            return text.rindex("<think>", 0, start)
    return start
