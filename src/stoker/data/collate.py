"""Rows of documents as the micro-batches of one rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from stoker.data.batch import IGNORED, Batch

PAD_MULTIPLE = 8

Document = tuple[np.ndarray, np.ndarray]
"""Token ids uint32 and, for each, whether it is trained."""
Example = Sequence[Document]
"""Documents that stay together: one, or the chosen and the rejected answer of a pair."""
_Handle = TypeVar("_Handle")
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Collator:
    """Cuts the rows of a step, the same on every rank, into the micro-batches of rank `rank` of `world_size`.

    With `packing` a row holds several examples in `row_tokens` tokens; otherwise it is one example, whose documents
    become rows of their own, padded on the right. All ranks get equally many micro-batches: one that has no row left
    gets a row of padding. Of each micro-batch it gets part `part` of `num_parts` of every row (`Batch.part`).
    """

    micro_batch_size: int
    sequence_length: int
    packing: bool
    rank: int = 0
    world_size: int = 1
    pad_id: int = 0
    documents_per_example: int = 1
    part: int = 0
    num_parts: int = 1

    def __post_init__(self) -> None:
        sizes = (self.micro_batch_size, self.sequence_length, self.world_size, self.num_parts)
        if min(sizes) < 1 or not 0 <= self.rank < self.world_size or not 0 <= self.part < self.num_parts:
            raise ValueError("sizes must be positive, rank below world_size and part below num_parts")

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: as many sequences as an example has documents."""
        return self.sequence_length * self.documents_per_example

    def batches(self, rows: Sequence[Sequence[_Handle]], example: Callable[[_Handle], Example]) -> Iterator[Batch]:
        """Yields this rank's share of the rows, which hold examples or what `example` makes them of."""
        for mine in self.shares(rows):
            examples = [[example(handle) for handle in row] for row in mine] or [[]]
            batch = self._packed(examples) if self.packing else self._padded(examples)
            yield batch if self.num_parts == 1 else batch.part(self.part, self.num_parts)

    def shares(self, rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
        """Yields those of the rows that each of this rank's micro-batches holds."""
        together = self.micro_batch_size * self.world_size
        for start in range(0, len(rows), together):
            yield rows[start : start + together][self.rank :: self.world_size]

    def _packed(self, rows: Sequence[Sequence[Example]]) -> Batch:
        contents = [[document for example in row for document in example] for row in rows]
        return self._batch(contents, self.row_tokens)

    def _padded(self, rows: Sequence[Sequence[Example]]) -> Batch:
        nothing = [[] for _ in range(self.documents_per_example)]
        contents = [
            row_contents
            for row in rows
            for row_contents in ([[document] for example in row for document in example] or nothing)
        ]
        longest = max((len(ids) for row in contents for ids, _ in row), default=0)
        # A multiple of eight is what tensor cores prefer.
        width = max(1, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.sequence_length))
        return self._batch(contents, width)

    def _batch(self, contents: Sequence[Sequence[Document]], width: int) -> Batch:
        input_ids = np.full((len(contents), width), self.pad_id, dtype=np.int64)
        targets = np.full((len(contents), width), IGNORED, dtype=np.int64)
        for number, row in enumerate(contents):
            start = 0
            for ids, trained in row:
                end = start + len(ids)
                input_ids[number, start:end] = ids
                targets[number, start : end - 1] = np.where(trained[1:], input_ids[number, start + 1 : end], IGNORED)
                start = end
        row_tokens = tuple(sum(len(ids) for ids, _ in row) for row in contents)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            targets=torch.from_numpy(targets),
            document_lengths=_document_lengths(contents, width) if self.packing else None,
            num_tokens=sum(row_tokens),
            num_trained_tokens=int((targets != IGNORED).sum()),
            row_tokens=row_tokens,
            documents_per_example=self.documents_per_example,
        )


def _document_lengths(contents: Sequence[Sequence[Document]], width: int) -> tuple[tuple[int, ...], ...]:
    rows = []
    for row in contents:
        lengths = [len(ids) for ids, _ in row]
        tail = width - sum(lengths)
        rows.append((*lengths, tail) if tail else tuple(lengths))
    return tuple(rows)
