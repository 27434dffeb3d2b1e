"""One row of a source to what is tokenised: convert it, render it, and say which of its characters train."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stoker.data import formats, template
from stoker.data.audit import Tally
from stoker.data.formats import Format
from stoker.data.marks import Rendered, Turn
from stoker.data.options import Reading
from stoker.data.records import Conversation, Converted, Detail, Given, Pair, Texts
from stoker.data.template import ChatTemplate
from stoker.data.tokenize import Piece, Span
from stoker.errors import DataError

Tokenisable = Piece | Texts | Given


@dataclass(frozen=True)
class Training:
    """Which words are learned, where a source says nothing else.

    `train_on`: roles, or "all". `end_of_turn`: whose end-of-turn token trains ("turn", "all", "last", "none").
    """

    train_on: tuple[str, ...] = ("assistant",)
    end_of_turn: str = "turn"


class RowReader:
    """Turns the rows of one source into pieces to tokenise, and counts what it sees of them in `tally`."""

    def __init__(
        self,
        form: Format,
        reading: Reading,
        *,
        training: Training,
        tokenizer: Any,
        template_choice: str | None,
        tally: Tally,
    ) -> None:
        self.form = form
        self.reading = reading
        self.train_on = training.train_on if reading.chat.train_on is None else reading.chat.train_on
        self.end_of_turn = reading.chat.train_on_end_of_turn or training.end_of_turn
        self._tokenizer = tokenizer
        self._template_choice = reading.chat.chat_template or template_choice
        self._template: ChatTemplate | None = None
        self._vocabulary_size = len(tokenizer)
        self._tally = tally

    def pieces(self, row: Mapping[str, Any]) -> tuple[Tokenisable, ...]:
        """Returns what to tokenise of a row: one piece, or two for a pair (the better answer first).

        Raises DataError (without a place) for a row that cannot be taken.
        """
        converted = formats.convert(self.form, row, self.reading)
        if isinstance(converted, Pair):
            return (self._piece(converted.chosen), self._piece(converted.rejected))
        return (self._piece(converted),)

    def ready(self, sample: Sequence[Mapping[str, Any]]) -> None:
        """Compiles the chat template if a row of the sample needs one, so that a missing one is no row's fault.

        Raises DataError if there is none, or if it does not compile.
        """
        if any(_is_conversation(self._converted_or_none(row)) for row in sample):
            self._ready_template()

    def identity(self) -> dict[str, Any]:
        """Returns what shapes the pieces besides the rows, as JSON values."""
        return identity(self.form.name, self.reading, self._tokenizer, self._template_choice)

    def _converted_or_none(self, row: Mapping[str, Any]) -> Converted | None:
        try:
            return formats.convert(self.form, row, self.reading)
        except DataError:  # said with its place when its turn comes
            return None

    def _ready_template(self) -> ChatTemplate:
        if self._template is None:
            choice, variables = self._template_choice, self.reading.chat.chat_template_kwargs
            self._template = template.resolve(self._tokenizer, choice, variables=variables)
            self._tally.templates[f"{self._template.origin}, by {self._template.method}"] = None
        return self._template

    def _piece(self, converted: Conversation | Texts | Given) -> Tokenisable:
        if isinstance(converted, Given):
            if max(converted.ids) >= self._vocabulary_size:
                raise DataError(
                    f"token id {max(converted.ids)} is outside the tokenizer's {self._vocabulary_size:,} tokens.",
                    fix="Use the tokenizer that made the rows.",
                )
            return converted
        if isinstance(converted, Texts):
            for text, _ in converted.parts:
                _refuse_what_is_no_character(text)
            learns_prompt = "all" in self.train_on and self.form.name in ("prompt", "prompt_completion")
            if learns_prompt:
                return replace(converted, parts=tuple((text, True) for text, _ in converted.parts))
            return converted
        return self._conversation(converted)

    def _conversation(self, conversation: Conversation) -> Piece:
        chat_template = self._ready_template()
        for message in conversation.messages:
            _refuse_what_is_no_character(message.get("content") or "")
        says_itself = conversation.trains is not None or conversation.details is not None
        ends_others = self.end_of_turn in ("all", "last") or self.reading.chat.train_on_eos in ("all", "last")
        by_tags = chat_template.has_generation_tags and self.train_on == ("assistant",)
        by_tags = by_tags and not says_itself and not ends_others
        roles = self._roles(conversation, everyone=ends_others)
        rendered = chat_template.render(conversation.messages, tools=conversation.tools, roles=roles, by_tags=by_tags)
        _refuse_what_is_no_character(rendered.text)
        self._count(conversation, rendered)
        if by_tags:
            spans = [Span(start, end, generated=True) for start, end in rendered.generated]
        else:
            spans = [self._span(turn, conversation, rendered.text) for turn in rendered.turns]
        if self.reading.chat.last_turn_only:
            spans = _only_last(spans)
        if not ends_others:
            spans = [span for span in spans if span.trains]
        contents = tuple((turn.start, turn.end) for turn in rendered.turns if not turn.whole)
        eos = self.reading.chat.train_on_eos
        return Piece(rendered.text, tuple(spans), contents, self.end_of_turn, eos, conversation.label)

    def _roles(self, conversation: Conversation, *, everyone: bool) -> tuple[str, ...] | None:
        """Returns the roles whose places must be certain; None for all."""
        if everyone or "all" in self.train_on:
            return None
        wanted = dict.fromkeys(self.train_on)
        for index, message in enumerate(conversation.messages):
            if self._trains(conversation, index):
                wanted[message["role"]] = None
        return tuple(wanted)

    def _trains(self, conversation: Conversation, index: int) -> bool:
        """Whether a message trains: as it says itself, else by its role."""
        own = conversation.trains[index] if conversation.trains else None
        if own is not None:
            return own
        return "all" in self.train_on or conversation.messages[index]["role"] in self.train_on

    def _span(self, turn: Turn, conversation: Conversation, text: str) -> Span:
        trains = self._trains(conversation, turn.message)
        detail = conversation.details[turn.message] if conversation.details and trains else None
        parts = None if detail is None else _parts(detail, turn, conversation.messages[turn.message], text)
        return Span(turn.start, turn.end, turn.whole, trains, parts)

    def _count(self, conversation: Conversation, rendered: Rendered) -> None:
        self._tally.counts["rows_by_turn"] += rendered.by_turns
        shown = {turn.message for turn in rendered.turns}
        for index, message in enumerate(conversation.messages):
            self._tally.roles[message["role"]] += 1
            if message.get("content") and self._trains(conversation, index):
                is_lost = index not in shown or _is_left_out(message, rendered, index)
                self._tally.counts["turns_not_rendered"] += is_lost


def _is_left_out(message: Mapping[str, Any], rendered: Rendered, index: int) -> bool:
    """Whether a template prints a message's calls and not what it says besides, as some do."""
    if not message.get("tool_calls") or not isinstance(message["content"], str):
        return False
    said = message["content"].strip()
    turns = (rendered.text[turn.start : turn.end] for turn in rendered.turns if turn.message == index and turn.whole)
    return any(said not in text for text in turns)


def identity(name: str, reading: Reading, tokenizer: Any, template_choice: str | None) -> dict[str, Any]:
    """Returns what shapes the pieces of a source besides its rows, as JSON values: for the cache's key."""
    choice = reading.chat.chat_template or template_choice
    return {"format": name, "reading": asdict(reading), "template": template.source_of(tokenizer, choice)}


def _is_conversation(converted: Converted | None) -> bool:
    return isinstance(converted.chosen if isinstance(converted, Pair) else converted, Conversation)


def _refuse_what_is_no_character(text: str) -> None:
    """Raises DataError for NUL, and for half of a surrogate pair: JSON can write both, and no text means them."""
    place = text.find("\0")
    if place >= 0:
        raise DataError(
            f"the text holds a NUL (\\u0000 at character {place}), which no text means: its file may be damaged.",
            fix="Remove it from the rows.",
        )
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half of a surrogate pair (\\u{ord(text[error.start]):04x} at character {error.start}), "
            "which is no character.",
            fix="Write the rows as UTF-8 from whole texts.",
        ) from error


def _parts(detail: Detail, turn: Turn, message: Mapping[str, Any], text: str) -> tuple[tuple[int, int], ...]:
    """Returns where the characters of the content that train stand in the rendered text."""
    content = message.get("content") or ""
    core = content.strip()
    lead = content.find(core)
    # A content closes its turn; a thought may stand before it.
    start = text.rfind(core, turn.start, turn.end) if core else -1
    if start < 0 or text[start + len(core) : turn.end].strip() or turn.whole:
        raise DataError(
            f"the chat template changes the content of message {turn.message} ({turn.role}), so the characters that "
            "its detail names cannot be found.",
            fix="Use a chat template that prints contents as they are.",
        )
    first, last = max(turn.start, start - lead), turn.end
    moved = ((max(begin + start - lead, first), min(end + start - lead, last)) for begin, end in detail)
    return tuple((begin, end) for begin, end in moved if end > begin)


def _only_last(spans: list[Span]) -> list[Span]:
    last = max((index for index, span in enumerate(spans) if span.trains), default=-1)
    return [replace(span, trains=span.trains and index == last) for index, span in enumerate(spans)]
