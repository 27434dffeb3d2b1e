"""Batches of an optimiser step as a pure function of its number: nothing to save but that integer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from stoker.data.batch import IGNORED, Batch
from stoker.data.pack import pack
from stoker.errors import DataError

PAD_MULTIPLE = 8


class Documents(Protocol):
    """Tokenised documents: what `Prepared` and its parts offer to a loader."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        ...

    @property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each document, int64."""
        ...

    def __len__(self) -> int: ...

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids and, for each, whether it is trained."""
        ...


@dataclass(frozen=True)
class _Epoch:
    """The rows of one epoch, in their order: each a list of document indices."""

    rows: Sequence[Sequence[int]]


class StepLoader:
    """Cuts documents into optimiser steps and those into micro-batches, for one rank of `world_size`.

    Each epoch holds every document with a trained token once, in an order drawn from (`seed`, epoch). A step holds
    `batch_size` rows over all ranks; the last step of an epoch holds what is left. With `packing`, a row is
    `sequence_length` tokens of several documents, and documents of equal length trade places between epochs;
    otherwise a row is one document, and a step's rows are sorted by length so that a micro-batch pads little (the
    sum over a step does not depend on how it is cut). All ranks get equally many micro-batches of a step: one that
    has no row left gets a row of padding.

    Raises DataError if no document has a trained token, ValueError for a document longer than `sequence_length`.
    """

    def __init__(
        self,
        prepared: Documents,
        *,
        batch_size: int,
        micro_batch_size: int,
        sequence_length: int,
        packing: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int = 0,
    ) -> None:
        if min(batch_size, micro_batch_size, sequence_length, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError("sizes must be positive and rank below world_size")
        self._documents = prepared
        self._usable = np.flatnonzero(prepared.trained_counts > 0)
        if not len(self._usable):
            raise DataError(
                "no document has a trained token, so there is nothing to learn from.",
                fix="Look at the rows with `stoker inspect`; data.train_on may name roles that the data does not have.",
            )
        longest = int(prepared.lengths[self._usable].max())
        if longest > sequence_length:
            raise ValueError(f"a document has {longest} tokens, more than sequence_length = {sequence_length}")
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.sequence_length = sequence_length
        self.packing = packing
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.pad_id = pad_id
        # Documents by falling length; packing places ranks in this order, an epoch decides which document has which.
        self._sorted_lengths = np.sort(prepared.lengths[self._usable])[::-1]
        self._layout = pack(self._sorted_lengths, sequence_length) if packing else None
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def num_rows(self) -> int:
        """Rows in an epoch, over all ranks: documents, or packed rows."""
        return len(self._usable) if self._layout is None else len(self._layout)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch, the last of them possibly smaller."""
        return -(-self.num_rows // self.batch_size)

    @property
    def padding_share(self) -> float:
        """Share of padding in an epoch's packed rows; 0.0 for plain rows, whose padding depends on the micro-batch."""
        if self._layout is None:
            return 0.0
        return 1.0 - float(self._sorted_lengths.sum()) / (len(self._layout) * self.sequence_length)

    def step(self, index: int) -> list[Batch]:
        """Returns this rank's micro-batches of optimiser step `index`, counted from 0 over all epochs."""
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self.batch_size
        return list(self._batches(self._epoch(epoch).rows[start : start + self.batch_size]))

    def all(self) -> Iterator[Batch]:
        """Yields this rank's micro-batches of every row once, in the data's order (longest first when packing)."""
        yield from self._batches(self._rows(self._usable), sort=False)

    def _make_epoch(self, epoch: int) -> _Epoch:
        generator = np.random.default_rng([self.seed, epoch])
        rows = self._rows(generator.permutation(self._usable))
        order = generator.permutation(len(rows)) if self.packing else range(len(rows))
        return _Epoch([rows[index] for index in order])

    def _rows(self, documents: np.ndarray) -> list[list[int]]:
        if self._layout is None:
            return [[index] for index in documents.tolist()]
        by_length = documents[np.argsort(-self._documents.lengths[documents], kind="stable")]
        return [by_length[row].tolist() for row in self._layout]

    def _batches(self, rows: Sequence[Sequence[int]], *, sort: bool = True) -> Iterator[Batch]:
        """Yields this rank's share: neighbours in length form the micro-batches of all ranks at the same moment."""
        if sort and not self.packing:
            lengths = self._documents.lengths
            rows = sorted(rows, key=lambda row: -lengths[row[0]])
        together = self.micro_batch_size * self.world_size
        for start in range(0, len(rows), together):
            mine = rows[start : start + together][self.rank :: self.world_size]
            yield self._batch(mine)

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        contents = [[self._documents.document(index) for index in row] for row in rows] or [[]]
        row_tokens = tuple(sum(len(ids) for ids, _ in row) for row in contents)
        width = self.sequence_length if self.packing else self._padded(max(row_tokens))
        input_ids = np.full((len(contents), width), self.pad_id, dtype=np.int64)
        targets = np.full((len(contents), width), IGNORED, dtype=np.int64)
        for number, row in enumerate(contents):
            start = 0
            for ids, trained in row:
                end = start + len(ids)
                input_ids[number, start:end] = ids
                targets[number, start : end - 1] = np.where(trained[1:], input_ids[number, start + 1 : end], IGNORED)
                start = end
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            targets=torch.from_numpy(targets),
            document_lengths=self._document_lengths(contents, width) if self.packing else None,
            num_tokens=sum(row_tokens),
            num_trained_tokens=int((targets != IGNORED).sum()),
            row_tokens=row_tokens,
        )

    def _padded(self, length: int) -> int:
        """Rounds up to a multiple of eight, which tensor cores prefer, but not past `sequence_length`."""
        return max(1, min(-(-length // PAD_MULTIPLE) * PAD_MULTIPLE, self.sequence_length))

    @staticmethod
    def _document_lengths(
        contents: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], width: int
    ) -> tuple[tuple[int, ...], ...]:
        rows = []
        for row in contents:
            lengths = [len(ids) for ids, _ in row]
            tail = width - sum(lengths)
            rows.append((*lengths, tail) if tail else tuple(lengths))
        return tuple(rows)
