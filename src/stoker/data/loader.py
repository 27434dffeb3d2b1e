"""Batches of an optimiser step as a pure function of its number: nothing to save but that integer."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from stoker.data.batch import Batch
from stoker.data.collate import Collator, Example
from stoker.data.mixture import Mixture
from stoker.data.pack import Layout, next_fit
from stoker.data.shuffle import shuffled
from stoker.errors import DataError


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

    @property
    def documents_per_example(self) -> int:
        """How many neighbouring documents stay together: 1, or 2 for pairs."""
        ...

    @property
    def source_starts(self) -> tuple[int, ...]:
        """The first document of each source."""
        ...

    def __len__(self) -> int: ...

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids and, for each, whether it is trained."""
        ...


class StepLoader:
    """Cuts documents into optimiser steps and those into micro-batches, for one rank of `world_size`.

    Each epoch holds every example (a document, or the documents of a pair) with a trained token once, in an order that
    (`seed`, epoch) chooses, or with `shuffle` off in the data's. A step holds `batch_size` rows over all ranks; the
    last step of an epoch holds what is left. With `packing`, a row is `sequence_length` tokens (for pairs twice as
    many) of several examples, and examples of equal length trade places between epochs; otherwise a row is one example,
    and a step's rows are sorted by length so that a micro-batch pads little (the sum over a step does not depend on how
    it is cut). All ranks get equally many micro-batches of a step.

    With `weights`, one for each source, rows hold examples of one source each and sources take turns in those shares;
    an epoch is then as many rows as all sources hold, in which a source may come short or come again.

    With `num_parts`, so many processes share each micro-batch, and this one has part `part` of all its rows.

    Any row of any epoch is computed from its number, without what came before. Raises DataError if no document has a
    trained token, ValueError for a document longer than `sequence_length`.
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
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError("sizes must be positive")
        self._documents = prepared
        self._together = prepared.documents_per_example
        self._collator = Collator(
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            packing=packing,
            rank=rank,
            world_size=world_size,
            pad_id=pad_id,
            documents_per_example=self._together,
            part=part,
            num_parts=num_parts,
        )
        self.batch_size = batch_size
        self.packing = packing
        self._lengths = prepared.lengths.reshape(-1, self._together).sum(axis=1)
        trained = prepared.trained_counts.reshape(-1, self._together).sum(axis=1)
        usable = np.flatnonzero(trained > 0)
        if not len(usable):
            raise DataError(
                "no document has a trained token, so there is nothing to learn from.",
                fix="Look at the rows with `stoker inspect`; data.train_on may name roles that the data does not have.",
            )
        longest = int(prepared.lengths.reshape(-1, self._together)[usable].max())
        if longest > sequence_length:
            raise ValueError(f"a document has {longest} tokens, more than sequence_length = {sequence_length}")
        parts = [usable] if weights is None else self._by_source(usable, weights)
        self._mixture = None if weights is None else Mixture(weights, seed=seed)
        self._pools = [
            _Pool(self._lengths, part, seed=seed, salt=number, capacity=self._collator.row_tokens if packing else None,
                  shuffle=shuffle)
            for number, part in enumerate(parts)
        ]  # fmt: skip

    def _by_source(self, usable: np.ndarray, weights: Sequence[float]) -> list[np.ndarray]:
        starts = np.asarray(self._documents.source_starts, dtype=np.int64) // self._together
        if len(weights) != len(starts):
            raise ValueError(f"{len(weights)} weights for {len(starts)} sources")
        parts = np.split(usable, np.searchsorted(usable, starts[1:]))
        for number, part in enumerate(parts):
            if not len(part):
                raise DataError(
                    f"source {number + 1} of data.train has a weight and no document with a trained token.",
                    fix="Remove the source, or look at it with `stoker inspect`.",
                )
        return parts

    @property
    def num_rows(self) -> int:
        """Rows in an epoch, over all ranks: examples, or packed rows."""
        return sum(map(len, self._pools))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch, the last of them possibly smaller."""
        return -(-self.num_rows // self.batch_size)

    @property
    def padding_share(self) -> float:
        """Share of padding in an epoch's packed rows; 0.0 for plain rows, whose padding depends on the micro-batch."""
        if not self.packing:
            return 0.0
        positions = self.num_rows * self._collator.row_tokens
        return 1.0 - sum(pool.num_tokens for pool in self._pools) / positions

    def step(self, index: int) -> list[Batch]:
        """Returns this rank's micro-batches of optimiser step `index`, counted from 0 over all epochs."""
        return list(self._collator.batches(self._step_rows(index), self._example))

    def examples(self, index: int) -> list[list[int]]:
        """Returns the examples in each of this rank's micro-batches of step `index`: places in the prepared data."""
        shares = self._collator.shares(self._step_rows(index))
        return [[example for row in share for example in row] for share in shares]

    def _step_rows(self, index: int) -> list[list[int]]:
        """Returns the rows of a step over all ranks, in the order in which they are dealt out."""
        epoch, within = divmod(index, self.steps_per_epoch)
        first = within * self.batch_size
        numbers = np.arange(first, min(first + self.batch_size, self.num_rows)) + epoch * self.num_rows
        rows = self._rows(numbers)
        if not self.packing:
            rows = sorted(rows, key=lambda row: -self._lengths[row[0]])
        return rows

    def all(self) -> Iterator[Batch]:
        """Yields this rank's micro-batches of every row once, in the data's order (longest first when packing)."""
        rows = [row for pool in self._pools for row in pool.all()]
        yield from self._collator.batches(rows, self._example)

    def _rows(self, numbers: np.ndarray) -> list[list[int]]:
        """Returns the examples of the rows with these numbers, counted over all epochs."""
        if self._mixture is None:
            return self._pools[0].rows(numbers)
        sources, within = self._mixture.locate(numbers)
        rows: list[list[int]] = [[] for _ in numbers]
        for source, pool in enumerate(self._pools):
            chosen = np.flatnonzero(sources == source)
            for place, row in zip(chosen.tolist(), pool.rows(within[chosen]), strict=True):
                rows[place] = row
        return rows

    def _example(self, index: int) -> Example:
        first = index * self._together
        return [self._documents.document(first + number) for number in range(self._together)]


class _Pool:
    """Rows without end from some examples: pass after pass over them, each pass in an order of its own."""

    def __init__(
        self, lengths: np.ndarray, examples: np.ndarray, *, seed: int, salt: int, capacity: int | None, shuffle: bool
    ) -> None:
        self._key = (seed, salt)
        self._shuffle = shuffle
        self._examples = examples
        self._layout: Layout | None = None
        self._ends = np.arange(1, len(examples) + 1)
        self.num_tokens = int(lengths[examples].sum())
        if capacity is not None and shuffle:
            self._layout = Layout(lengths[examples], capacity)
            self._examples = examples[_by_falling_length(lengths[examples])]
        elif capacity is not None:
            self._ends = next_fit(lengths[examples], capacity)

    def __len__(self) -> int:
        return len(self._ends) if self._layout is None else len(self._layout)

    def rows(self, numbers: np.ndarray) -> list[list[int]]:
        """Returns the examples of the rows with these numbers, counted over all passes."""
        if not len(numbers):
            return []
        passes, within = np.divmod(numbers, len(self))
        if self._shuffle:
            within = shuffled(within, len(self), *self._key, 0, salts=passes)
        if self._layout is None:
            return [self._in_order(row) for row in within.tolist()]
        rows = [self._layout.row(row) for row in within.tolist()]
        sizes = [len(row) for row in rows]
        flat = np.array([part for row in rows for part in row], dtype=np.int64).reshape(-1, 2)
        chosen = self._placed(flat[:, 0], flat[:, 1], np.repeat(passes, sizes))
        return [part.tolist() for part in np.split(chosen, np.cumsum(sizes)[:-1])]

    def all(self) -> Iterator[list[int]]:
        """Yields every row once: in the data's order, or the longest examples first when packing."""
        if self._layout is None:
            yield from map(self._in_order, range(len(self)))
            return
        before = self._layout.before_length
        for index in range(len(self._layout)):
            yield [int(self._examples[before[length] + number]) for length, number in self._layout.row(index)]

    def _in_order(self, row: int) -> list[int]:
        start = int(self._ends[row - 1]) if row else 0
        return self._examples[start : int(self._ends[row])].tolist()

    def _placed(self, lengths: np.ndarray, numbers: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Returns the example that stands for number so-and-so of its length in a pass."""
        assert self._layout is not None
        # Lengths and passes each have orders of their own, so that neighbours in one pass part in the next.
        salts = passes * (self._layout.capacity + 1) + lengths
        moved = shuffled(numbers, self._layout.counts[lengths], *self._key, 1, salts=salts)
        return self._examples[self._layout.before_length[lengths] + moved]


def _by_falling_length(lengths: np.ndarray) -> np.ndarray:
    """Returns the stable order by falling length; sixteen bits are sorted in linear time (radix)."""
    falling = lengths.max() - lengths
    return np.argsort(falling.astype(np.uint16) if falling.max() < 1 << 16 else falling, kind="stable")
