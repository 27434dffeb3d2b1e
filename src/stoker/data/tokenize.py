"""Token ids and loss masks from rendered text: a token trains if it overlaps a trained span of characters."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from stoker import collector
from stoker.data.records import Given, Texts
from stoker.data.words import word_encoder
from stoker.errors import DataError


@dataclass(frozen=True)
class Span:
    """Characters of a turn, `text[start:end]`, besides the end-of-turn token that follows.

    `generated`: the span was taken from what the template prints for a turn, and may take in the end-of-turn token and
    a line break after it. `trains`: whether the turn trains; `parts` are the characters that do, None for all.
    """

    start: int
    end: int
    generated: bool = False
    trains: bool = True
    parts: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Piece:
    """A rendered conversation to tokenise.

    `end_of_turn` says whose end-of-turn token trains ("turn", "all", "last", "none"), `eos` the same for turns that end
    with EOS (None: as `end_of_turn`). `label` goes to the trained tokens.
    """

    text: str
    spans: tuple[Span, ...] = ()
    contents: tuple[tuple[int, int], ...] = ()
    """Where contents stand, to tell the template's special tokens from those in contents."""
    end_of_turn: str = "turn"
    eos: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class Document:
    """A tokenised row: `ids` uint32 and `trained` bool, both `[tokens]`.

    `turns`: for each trained span of a conversation its first token and its end-of-turn token (-1 if it has none).
    `labels`: int8 `[tokens]` for rows that judge, -1 where there is no label.
    """

    ids: np.ndarray
    trained: np.ndarray
    turns: tuple[tuple[int, int], ...] = ()
    special_in_content: bool = False
    doubled_bos: bool = False
    labels: np.ndarray | None = None


class Tokenizer:
    """Tokenises batches of pieces with a fast Hugging Face tokenizer.

    Raises DataError for a tokenizer that cannot tell character offsets.
    """

    def __init__(self, tokenizer: Any, *, end_of_turn_tokens: Sequence[str] = ()) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer cannot say which characters a token stands for (it is not a fast tokenizer).",
                fix="Use a model folder with a tokenizer.json.",
            )
        self._tokenizer = tokenizer
        self._words = word_encoder(tokenizer, self._encode_whole)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.vocabulary_size = len(tokenizer)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        ends = {self._end_id(text) for text in end_of_turn_tokens} or special
        self._is_special, self._is_end = self._flags(special), self._flags(special | ends)
        self._ends = ends if end_of_turn_tokens else None
        beginning = tokenizer("", add_special_tokens=True)["input_ids"]
        self._beginning = [token for token in beginning if token != self._eos or token == self._bos][:1]

    def _end_id(self, text: str) -> int:
        """Returns the id of an end-of-turn token."""
        found = self._tokenizer.convert_tokens_to_ids(text)
        if found is None or self._tokenizer.convert_ids_to_tokens(found) != text:
            raise DataError(
                f"data.end_of_turn_tokens: {text!r} is not a token of this tokenizer.",
                fix="Name tokens as the vocabulary has them.",
            )
        return int(found)

    def _flags(self, ids: set[int]) -> np.ndarray:
        flags = np.zeros(max(len(self._tokenizer), *ids, 0) + 1, dtype=bool)
        flags[list(ids)] = True
        return flags

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token, as the vocabulary has it."""
        return self._tokenizer.convert_ids_to_tokens(int(token_id))

    def documents(self, pieces: Sequence[Piece | Texts | Given]) -> list[Document]:
        """Returns the tokenised pieces, in order."""
        results: list[Document | None] = [None] * len(pieces)
        for kind, tokenised in _KINDS.items():
            chosen = [index for index, piece in enumerate(pieces) if _kind(piece) == kind]
            if chosen:
                documents = tokenised(self, [pieces[index] for index in chosen])
                for index, document in zip(chosen, documents, strict=True):
                    results[index] = document
        return [document for document in results if document is not None]

    def _encode(self, texts: list[str], *, special: bool) -> tuple[list[list[int]], np.ndarray]:
        """Returns ids by text, and the character offsets of all tokens, int64 `[all tokens, 2]`.

        With `special`, the tokenizer adds its special tokens and nobody asks for offsets.
        """
        if self._words is not None and not special:
            ids, offsets = self._words.encode(texts)
            return [one.tolist() for one in ids], offsets
        return self._encode_whole(texts, special=special)

    def _encode_whole(self, texts: list[str], *, special: bool = False) -> tuple[list[list[int]], np.ndarray]:
        # Else the collector walks over offsets again and again: a tuple a token, and no cycle among them. Measured on
        # 4,000 chats of 390 tokens: 8% of the time to prepare them.
        with collector.at_rest():
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

    def _plain(self, texts: list[Texts]) -> list[Document]:
        """Text to continue: BOS as the tokenizer does it, EOS at the end, everything trained."""
        documents = []
        encoded = self._encode([text.parts[0][0] for text in texts], special=True)[0]
        for text, tokens in zip(texts, encoded, strict=True):
            if self._eos is not None and (not tokens or tokens[-1] != self._eos):
                tokens.append(self._eos)
            ids = np.array(tokens, dtype=np.uint32)
            trained = np.full(len(ids), text.parts[0][1])
            trained[:1] = False
            documents.append(Document(ids, trained, doubled_bos=self._starts_twice(tokens)))
        return documents

    def _joined(self, texts: list[Texts]) -> list[Document]:
        """Texts tokenised one by one and laid end to end."""
        encoded = iter(self._encode([part for text in texts for part, _ in text.parts], special=False)[0])
        return [self._end_to_end(text, [next(encoded) for _ in text.parts]) for text in texts]

    def _end_to_end(self, text: Texts, parts: list[list[int]]) -> Document:
        begins = text.whole and parts[0][:1] != self._beginning
        ends = text.whole and self._eos is not None and parts[-1][-1:] != [self._eos]
        before, after = self._beginning if begins else [], [self._eos] if ends else []
        tokens = [*before, *chain.from_iterable(parts), *after]
        lengths = [len(part) for part in parts]
        flags = [trains for _, trains in text.parts]
        trained = np.repeat([flags[0], *flags, flags[-1]], [len(before), *lengths, len(after)])
        labels = None if text.steps is None and text.label is None else np.full(len(tokens), -1, dtype=np.int8)
        if labels is not None and text.steps is not None:
            for position, label in zip(len(before) + np.cumsum(lengths) - 1, text.steps, strict=True):
                if label >= 0:
                    labels[position], trained[position] = label, True
        trained[:1] = False
        if labels is not None and text.label is not None:
            labels[trained] = text.label
        ids = np.array(tokens, dtype=np.uint32)
        return Document(ids, trained, doubled_bos=self._starts_twice(tokens), labels=labels)

    def _given(self, rows: list[Given]) -> list[Document]:
        """Rows that are tokens already."""
        documents = []
        for row in rows:
            trained = np.array(row.trained, dtype=bool)
            trained[:1] = False
            documents.append(Document(np.array(row.ids, dtype=np.uint32), trained))
        return documents

    def _masked(self, pieces: list[Piece]) -> list[Document]:
        texts = [piece.text for piece in pieces]
        encode = self._encode_whole if self._words is None else self._words.encode
        all_ids, offsets = encode(texts)
        documents, position = [], 0
        for piece, tokens in zip(pieces, all_ids, strict=True):
            mine = offsets[position : position + len(tokens)]
            position += len(tokens)
            documents.append(self._document(piece, tokens, mine))
        return documents

    def _document(self, piece: Piece, tokens: Sequence[int] | np.ndarray, offsets: np.ndarray) -> Document:
        ids = np.array(tokens, dtype=np.uint32)
        # A byte-level tokenizer that trims offsets leaves a token of white space no characters: it gets the last one.
        starts, ends = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
        places = self._is_end[ids].nonzero()[0]
        special = list(zip(ends[places].tolist(), places.tolist(), strict=True))
        trained = np.zeros(len(ids), dtype=bool)
        found = [self._end_token(piece.text, span, tokens, starts, special) for span in piece.spans]
        learned = self._learned_ends(piece, tokens, found)
        turns = []
        for span, end_token, learns_end in zip(piece.spans, found, learned, strict=True):
            if not span.trains:
                trained[end_token] |= learns_end
                continue
            until = span.end
            if end_token >= 0:
                until = max(until, int(ends[end_token])) if learns_end else min(until, int(starts[end_token]))
            first = int(ends.searchsorted(span.start, side="right"))
            if span.parts is None:
                trained[first : int(starts.searchsorted(until))] = True
            for start, end in span.parts or ():
                trained[int(ends.searchsorted(start, side="right")) : int(starts.searchsorted(end))] = True
            if learns_end and span.parts is not None:
                trained[end_token] = True
            turns.append((first, end_token))
        trained[:1] = False
        inside = any(self._special_within(special, tokens, start, end) for start, end in piece.contents)
        labels = None if piece.label is None else np.where(trained, piece.label, -1).astype(np.int8)
        return Document(ids, trained, tuple(turns), inside, self._starts_twice(tokens), labels)

    def _learned_ends(self, piece: Piece, tokens: Sequence[int] | np.ndarray, found: list[int]) -> list[bool]:
        """Returns for each span whether its end-of-turn token trains; a span whose last character does not, keeps its
        end from training too."""
        if piece.end_of_turn == "turn" and piece.eos is None:
            return [end >= 0 and _reaches_end(span) for span, end in zip(piece.spans, found, strict=True)]
        last = max((index for index, end in enumerate(found) if end >= 0), default=-1)
        learned = []
        for index, (span, end) in enumerate(zip(piece.spans, found, strict=True)):
            choice = piece.eos if end >= 0 and piece.eos and tokens[end] == self._eos else piece.end_of_turn
            wanted = {"turn": _reaches_end(span), "all": True, "last": index == last, "none": False}[choice]
            learned.append(end >= 0 and wanted)
        return learned

    def _end_token(
        self,
        text: str,
        span: Span,
        tokens: Sequence[int] | np.ndarray,
        starts: np.ndarray,
        special: list[tuple[int, int]],
    ) -> int:
        """Returns the index of the first special token right after the content (white space aside), or -1.

        `special` holds `(end, index)` of the special tokens. A generated span may itself end with that token. A BOS
        that opens the next turn ends nothing, unless it is the EOS too.
        """
        if span.generated:
            content_end = span.start + len(text[span.start : span.end].rstrip())
            position = bisect_left(special, (content_end, -1))
            if position < len(special) and special[position][0] == content_end > span.start:
                return self._if_end(special[position][1], tokens)
        position = bisect_left(special, (span.end + 1, -1))
        if position == len(special):
            return -1
        token = special[position][1]
        gap = text[span.end : max(span.end, int(starts[token]))]
        is_opening = tokens[token] == self._bos != self._eos
        return -1 if gap.strip() or is_opening else self._if_end(token, tokens)

    def _if_end(self, index: int, tokens: Sequence[int] | np.ndarray) -> int:
        """Returns the index if its token may end a turn, else -1."""
        return index if self._ends is None or tokens[index] in self._ends else -1

    def _starts_twice(self, tokens: Sequence[int] | np.ndarray) -> bool:
        return self._bos is not None and len(tokens) > 1 and bool(tokens[0] == tokens[1] == self._bos)

    def _special_within(
        self, special: list[tuple[int, int]], tokens: Sequence[int] | np.ndarray, start: int, end: int
    ) -> bool:
        """Whether a special token ends at a position in `(start, end]`."""
        position = bisect_left(special, (start + 1, -1))
        while position < len(special) and special[position][0] <= end:
            if self._is_special[tokens[special[position][1]]]:
                return True
            position += 1
        return False


def _reaches_end(span: Span) -> bool:
    """Whether the span trains up to its last character."""
    return span.trains and (span.parts is None or (bool(span.parts) and span.parts[-1][1] >= span.end))


def _kind(piece: Piece | Texts | Given) -> str:
    if isinstance(piece, Texts):
        is_text = piece.whole and len(piece.parts) == 1 and piece.label is None and piece.steps is None
        return "text" if is_text else "texts"
    return "tokens" if isinstance(piece, Given) else "conversation"


_KINDS: dict[str, Callable[[Tokenizer, list[Any]], list[Document]]] = {
    "conversation": Tokenizer._masked,
    "text": Tokenizer._plain,
    "texts": Tokenizer._joined,
    "tokens": Tokenizer._given,
}
