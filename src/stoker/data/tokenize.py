"""Token ids and loss masks from rendered text: a token trains if it overlaps a trained span of characters."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from stoker.data.marks import Rendered
from stoker.errors import DataError


@dataclass(frozen=True)
class Span:
    """Characters to train, `text[start:end]`, besides the end-of-turn token that follows.

    `generated`: the template itself declares them, and may take in the end-of-turn token and a line break after it.
    """

    start: int
    end: int
    generated: bool = False


@dataclass(frozen=True)
class Piece:
    """A text to tokenise: with trained spans, or None if it is a plain text of which everything trains."""

    text: str
    spans: tuple[Span, ...] | None = None
    contents: tuple[tuple[int, int], ...] = ()
    """Where contents stand, to tell the template's special tokens from those in contents."""


@dataclass(frozen=True)
class Document:
    """A tokenised text: `ids` uint32 and `trained` bool, both `[tokens]`.

    `turns`: for each trained span of a conversation its first token and its end-of-turn token (-1 if it has none).
    """

    ids: np.ndarray
    trained: np.ndarray
    turns: tuple[tuple[int, int], ...]
    special_in_content: bool = False
    doubled_bos: bool = False


def spans_to_train(rendered: Rendered, *, train_on: Sequence[str], use_generated: bool) -> tuple[Span, ...]:
    """Returns the spans of the turns whose role is in `train_on` ("all": every turn).

    With `use_generated` (the template has `{% generation %}` tags and only the assistant trains) what the tags enclose
    is taken instead.
    """
    if use_generated and not rendered.searched:
        return tuple(Span(start, end, generated=True) for start, end in rendered.generated)
    everything = "all" in train_on
    return tuple(Span(turn.start, turn.end) for turn in rendered.turns if everything or turn.role in train_on)


class Tokenizer:
    """Tokenises batches of pieces with a fast Hugging Face tokenizer.

    Raises DataError for a tokenizer that cannot tell character offsets.
    """

    def __init__(self, tokenizer: Any, *, train_on_end_of_turn: bool = True) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer cannot say which characters a token stands for (it is not a fast tokenizer).",
                fix="Use a model folder with a tokenizer.json.",
            )
        self._tokenizer = tokenizer
        self._train_end = train_on_end_of_turn
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._is_special = np.zeros(max(len(tokenizer), *special, 0) + 1, dtype=bool)
        self._is_special[list(special)] = True

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token, as the vocabulary has it."""
        return self._tokenizer.convert_ids_to_tokens(int(token_id))

    def documents(self, pieces: Sequence[Piece]) -> list[Document]:
        """Returns the tokenised pieces, in order."""
        results: list[Document | None] = [None] * len(pieces)
        for plain in (False, True):
            chosen = [index for index, piece in enumerate(pieces) if (piece.spans is None) == plain]
            if chosen:
                tokenised = self._plain if plain else self._masked
                for index, document in zip(chosen, tokenised([pieces[index] for index in chosen]), strict=True):
                    results[index] = document
        return [document for document in results if document is not None]

    def _encode(self, texts: list[str], *, special: bool) -> tuple[list[list[int]], np.ndarray]:
        """Returns ids by text, and the character offsets of all tokens, int64 `[all tokens, 2]`."""
        encoded = self._tokenizer(
            texts,
            add_special_tokens=special,
            return_offsets_mapping=not special,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        ids = encoded["input_ids"]
        if special:
            return ids, np.empty((0, 2), dtype=np.int64)
        count = 2 * sum(map(len, ids))
        flat = np.fromiter(chain.from_iterable(chain.from_iterable(encoded["offset_mapping"])), np.int64, count)
        return ids, flat.reshape(-1, 2)

    def _plain(self, pieces: list[Piece]) -> list[Document]:
        """Text to continue: BOS as the tokenizer does it, EOS at the end, everything trained."""
        documents = []
        for tokens in self._encode([piece.text for piece in pieces], special=True)[0]:
            if self._eos is not None and (not tokens or tokens[-1] != self._eos):
                tokens.append(self._eos)
            ids = np.array(tokens, dtype=np.uint32)
            trained = np.ones(len(ids), dtype=bool)
            trained[:1] = False
            documents.append(Document(ids, trained, (), doubled_bos=self._starts_twice(tokens)))
        return documents

    def _masked(self, pieces: list[Piece]) -> list[Document]:
        all_ids, offsets = self._encode([piece.text for piece in pieces], special=False)
        documents, position = [], 0
        for piece, tokens in zip(pieces, all_ids, strict=True):
            mine = offsets[position : position + len(tokens)]
            position += len(tokens)
            documents.append(self._document(piece, tokens, mine))
        return documents

    def _document(self, piece: Piece, tokens: list[int], offsets: np.ndarray) -> Document:
        ids = np.array(tokens, dtype=np.uint32)
        # A byte-level tokenizer that trims offsets leaves a token of white space no characters: it gets the last one.
        starts, ends = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
        special = [(int(ends[index]), int(index)) for index in np.flatnonzero(self._is_special[ids])]
        trained = np.zeros(len(ids), dtype=bool)
        turns = []
        for span in piece.spans or ():
            end_token = self._end_token(piece.text, span, tokens, starts, special)
            until = span.end
            if end_token >= 0:
                until = max(until, int(ends[end_token])) if self._train_end else min(until, int(starts[end_token]))
            first = int(np.searchsorted(ends, span.start, side="right"))
            trained[first : int(np.searchsorted(starts, until, side="left"))] = True
            turns.append((first, end_token))
        trained[:1] = False
        inside = any(_ends_within(special, start, end) for start, end in piece.contents)
        return Document(ids, trained, tuple(turns), inside, self._starts_twice(tokens))

    def _end_token(
        self, text: str, span: Span, tokens: list[int], starts: np.ndarray, special: list[tuple[int, int]]
    ) -> int:
        """Returns the index of the first special token right after the content (white space aside), or -1.

        `special` holds `(end, index)` of the special tokens. A generated span may itself end with that token. A BOS
        that opens the next turn ends nothing, unless it is the EOS too.
        """
        if span.generated:
            content_end = span.start + len(text[span.start : span.end].rstrip())
            position = bisect_left(special, (content_end, -1))
            if position < len(special) and special[position][0] == content_end > span.start:
                return special[position][1]
        position = bisect_left(special, (span.end + 1, -1))
        if position == len(special):
            return -1
        token = special[position][1]
        gap = text[span.end : max(span.end, int(starts[token]))]
        is_opening = tokens[token] == self._bos != self._eos
        return -1 if gap.strip() or is_opening else token

    def _starts_twice(self, tokens: list[int]) -> bool:
        return self._bos is not None and len(tokens) > 1 and tokens[0] == tokens[1] == self._bos


def _ends_within(special: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether a special token ends at a position in `(start, end]`."""
    position = bisect_left(special, (start + 1, -1))
    return position < len(special) and special[position][0] <= end
