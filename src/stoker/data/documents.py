"""Chunks of rows to tokenised documents: what each preparation worker does."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from stoker.data import formats
from stoker.data.audit import Tally
from stoker.data.first_rows import stopped_at
from stoker.data.options import Reading
from stoker.data.pack import split_long
from stoker.data.readers import Raw, Row, parsed
from stoker.data.rows import RowReader, Training
from stoker.data.tokenize import Document, Tokenizer
from stoker.data.tokens import Tokens
from stoker.errors import DataError

ON_BAD_ROW = ("stop", "skip")
ON_LONG = ("truncate", "drop", "stop", "split")
_LONG_COUNTS = {"truncate": "truncated", "drop": "dropped", "split": "split"}


@dataclass(frozen=True)
class RowChunk:
    """Neighbouring rows of source number `source`; those whose places in the chunk are in `leave_out` are not taken."""

    source: int
    rows: tuple[Raw, ...]
    leave_out: frozenset[int] = frozenset()

    @property
    def place(self) -> str:
        """Where its rows stand."""
        return f"{self.rows[0].where} to {self.rows[-1].where}"


@dataclass(frozen=True)
class Made:
    """What a chunk became, and what was counted on the way."""

    tokens: Tokens
    tally: Tally
    num_rows: int


@dataclass(frozen=True)
class SourceForm:
    """How the rows of one source are read: the name of their format and its options."""

    format: str
    reading: Reading


@dataclass
class DocumentMaker:
    """Makes documents of at most `sequence_length` tokens from chunks of rows; picklable, so that workers can have it.

    `on_bad_row`: "stop" or "skip"; `on_long`: "truncate", "drop", "stop" or "split" (into pieces); documents of fewer
    than `min_length` tokens are left out.
    """

    sources: Sequence[SourceForm]
    tokenizer: Any
    training: Training
    end_of_turn_tokens: tuple[str, ...]
    template_choice: str | None
    sequence_length: int
    on_bad_row: str
    on_long: str
    min_length: int = 1
    _tally: Tally = field(default_factory=Tally, init=False)
    _readers: dict[int, RowReader] = field(default_factory=dict, init=False)
    _encoder: Tokenizer | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets: everything but what is compiled, which it compiles itself."""
        return self.__dict__ | {"_tally": Tally(), "_readers": {}, "_encoder": None}

    def reader(self, source: int) -> RowReader:
        """Returns what turns a source's rows into pieces to tokenise."""
        if source not in self._readers:
            form = self.sources[source]
            self._readers[source] = RowReader(
                formats.declared(form.format),
                form.reading,
                training=self.training,
                tokenizer=self.tokenizer,
                template_choice=self.template_choice,
                tally=self._tally,
            )
        return self._readers[source]

    def check(self) -> None:
        """Raises DataError if the tokenizer cannot be used."""
        self._tokenizer.token_text(0)

    def make(self, chunk: RowChunk) -> Made:
        """Returns the chunk's documents. Raises DataError naming the row that stops the preparation."""
        reader = self.reader(chunk.source)
        places, counts, pieces = [], [], []
        for index, raw in enumerate(chunk.rows):
            if index in chunk.leave_out:
                self._tally.counts["duplicates"] += 1
                continue
            row = parsed(raw)
            try:
                if row.error is not None:
                    raise DataError(row.error)
                of_row = reader.pieces(row.value)
            except DataError as error:
                self._bad_row(row, error)
                continue
            pieces.extend(of_row)
            counts.append(len(of_row))
            places.append(row.where)
        documents = iter(self._tokenizer.documents(pieces))
        kept: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        for where, count in zip(places, counts, strict=True):
            kept += self._kept(where, list(islice(documents, count)))
        return Made(Tokens.of(kept), self._tally.taken(), len(chunk.rows))

    def digests(self, chunk: RowChunk) -> list[bytes | None]:
        """Returns for each row a hash of its fields and values; None for a malformed one."""
        return [_digest(parsed(raw)) for raw in chunk.rows]

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._encoder is None:
            self._encoder = Tokenizer(self.tokenizer, end_of_turn_tokens=self.end_of_turn_tokens)
        return self._encoder

    def _bad_row(self, row: Row, error: DataError) -> None:
        if self.on_bad_row == "stop":
            raise stopped_at(row.where, error)
        self._tally.bad_row(f"{row.where}: {error.problems[0].what}")

    def _kept(self, where: str, documents: list[Document]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Applies the limits of length to a row's documents and counts them. The two of a pair go the same way."""
        counts, limit = self._tally.counts, self.sequence_length
        length = max(len(document.ids) for document in documents)
        on_long = "truncate" if self.on_long == "split" and len(documents) > 1 else self.on_long
        if length > limit:
            if on_long == "stop":
                raise DataError(
                    f"the row has {length:,} tokens, more than data.sequence_length = {limit:,}.",
                    where=where,
                    fix="Raise data.sequence_length, or set data.on_long to truncate or drop.",
                )
            counts[_LONG_COUNTS[on_long]] += 1
            if on_long == "drop":
                return []
        if min(len(document.ids) for document in documents) < self.min_length:
            counts["short"] += 1
            return []
        counts["rows"] += 1
        return [piece for document in documents for piece in self._pieces(where, document, on_long)]

    def _pieces(
        self, where: str, document: Document, on_long: str
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        limit, length = self.sequence_length, len(document.ids)
        ids, trained, labels = document.ids, document.trained, document.labels
        pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = [(ids, trained, labels)]
        if length > limit and on_long == "truncate":
            self._tally.counts["truncated_tokens"] += length - limit
            pieces = [(ids[:limit], trained[:limit], None if labels is None else labels[:limit])]
        elif length > limit:
            pieces = [(*piece, None) for piece in split_long(ids, trained, limit)]
        self._count_turns(document, length if on_long == "split" else limit)
        for part, mask, _ in pieces:
            self._tally.document(where, length=len(part), num_trained=int(np.count_nonzero(mask)))
        return pieces

    def _count_turns(self, document: Document, limit: int) -> None:
        counts = self._tally.counts
        counts["doubled_bos"] += document.doubled_bos
        counts["special_in_content"] += document.special_in_content
        for first, end in document.turns:
            if first < limit:
                counts["turns"] += 1
                if 0 <= end < limit and document.trained[end]:
                    counts["turns_with_end"] += 1
                    self._tally.end_tokens[self._tokenizer.token_text(document.ids[end])] += 1


def _digest(row: Row) -> bytes | None:
    if row.error is not None:
        return None
    text = json.dumps(row.value, ensure_ascii=False, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
