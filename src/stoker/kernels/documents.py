"""Where the documents of packed rows lie: as lengths, and as the tensors that kernels read.

Attention reads where documents begin and end (`Boundaries`), a rotation how far a position is into its own. A
recurrence starts anew wherever the number of the document changes, and an intermediate result may pass from position s
to position t only where the two are the same.

Lengths are known to the host. A CUDA graph replays what it was captured with, so there documents are a tensor whose
size stays the same (`Boundaries`), and all that follows from it is made on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from stoker import transfer

Lengths = Sequence[Sequence[int]]
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Documents of whole rows laid end to end, none of which crosses from one row into the next.

    `ends` [n + 1] int32: where each begins, and where the last one ends. Documents may be empty: those fill a tensor of
    a fixed size. `longest`: no document has more positions; kernels launch blocks for so many of each. What is made of
    them once for all layers is kept here, so that what `ends` holds must not change while layers are given this object;
    a CUDA graph makes it anew at every replay.
    """

    ends: Tensor
    longest: int
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Returns what `make` makes, from the first call with `key` on."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def lengths(self, num_rows: int, length: int) -> tuple[tuple[int, ...], ...]:
        """Returns each row's lengths, without those of empty documents. It waits for the device.

        Raises ValueError if the documents are not those of `num_rows` rows of `length` positions.
        """
        rows: list[tuple[int, ...]] = []
        row: list[int] = []
        for size in self.ends.diff().tolist():
            row += [size] if size else []
            if row and sum(row) >= length:
                rows.append(tuple(row))
                row = []
        if row or len(rows) != num_rows or any(sum(row) != length for row in rows):
            raise ValueError(f"the boundaries are not those of {num_rows} rows of {length} positions")
        return tuple(rows)


DocumentLengths = Lengths | Boundaries
"""For each row the lengths of its documents, or the same as a tensor."""


def boundaries_of(documents: DocumentLengths, device: torch.device) -> Boundaries:
    """Returns where documents begin and end, on the device.

    Those of lengths are kept, since every layer asks, and a copy from ordinary host memory makes the host wait for all
    that the GPU still has to do. Those of rows of one document are made anew without a copy: a CUDA graph may read
    them, for which nothing kept here would live long enough.
    """
    if isinstance(documents, Boundaries):
        return documents
    if (length := _only_length(documents)) is None:
        return _boundaries(_flat(documents), device)
    total = len(documents) * length
    return Boundaries(torch.arange(0, total + 1, length, dtype=torch.int32, device=device), length)


def _only_length(documents: Lengths) -> int | None:
    """The length of every row, where each is one document; None where one is packed."""
    length = documents[0][0] if documents and documents[0] else 0
    return length if length > 0 and all(len(row) == 1 and row[0] == length for row in documents) else None


@lru_cache(maxsize=16)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Boundaries:
    # What inference mode makes could not be saved for a backward later.
    with torch.inference_mode(mode=False):
        ends = (0, *itertools.accumulate(lengths))
        return Boundaries(transfer.int32s(ends, device), max(lengths, default=0))


def positions_in_documents(documents: DocumentLengths, num_rows: int, length: int, device: torch.device) -> Tensor:
    """Returns how far each position is into its document: [B, T] int32, from 0; made on the device."""
    if isinstance(documents, Boundaries):
        count = num_rows * length
        positions = documents.once(("positions", count), lambda: _positions(documents.ends, count))
        return positions.view(num_rows, length)
    if _only_length(documents) is not None:
        return torch.arange(length, dtype=torch.int32, device=device).expand(num_rows, length)
    return _kept_positions(_flat(documents), device).view(num_rows, length)


@lru_cache(maxsize=4)
def _kept_positions(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return _positions(_boundaries(lengths, device).ends, sum(lengths))


def _positions(ends: Tensor, count: int) -> Tensor:
    numbers, positions = _numbers(ends, count)
    return positions - ends[numbers]


def _numbers(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The number of each position's document, and the position itself: [count] int32. Empty documents have none."""
    positions = torch.arange(count, dtype=torch.int32, device=ends.device)
    return torch.searchsorted(ends, positions, right=True, out_int32=True) - 1, positions


def _row_numbers(documents: Boundaries, num_rows: int, length: int) -> Tensor:
    numbers = _numbers(documents.ends, num_rows * length)[0].view(num_rows, length)
    return numbers - numbers[:, :1]


def _flat(lengths: Lengths) -> tuple[int, ...]:
    return tuple(itertools.chain.from_iterable(lengths))


def document_ids(
    document_lengths: DocumentLengths | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Returns the number, from 0, of each position's document in its row: [B, T] int32, or None if all are number 0.

    `document_lengths`: for each row the lengths of its documents; None: a row is one document. Raises ValueError for
    lengths that do not sum to T. All layers of a model ask with the same tuple, so the last answers are kept. Of
    `Boundaries` numbers grow along a row, too, but empty documents before a position may count.
    """
    if document_lengths is None:
        return None
    if isinstance(document_lengths, Boundaries):
        return document_lengths.once(("numbers", batch, length), lambda: _row_numbers(document_lengths, batch, length))
    rows = tuple(tuple(row) for row in document_lengths)
    if len(rows) != batch or any(sum(row) != length for row in rows):
        raise ValueError(f"document_lengths must hold {batch} rows that sum to {length}")
    return None if all(len(row) <= 1 for row in rows) else _ids(rows, device)


@lru_cache(maxsize=16)
def _ids(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return _row_numbers(_boundaries(_flat(rows), device), len(rows), sum(rows[0]))


def starts(ids: Tensor) -> Tensor:
    """Returns [B, T] of bool: where another document starts than the one of the position before (never at 0)."""
    first = torch.zeros_like(ids[:, :1], dtype=torch.bool)
    return torch.cat((first, ids[:, 1:] != ids[:, :-1]), dim=1)


def same_as_before(ids: Tensor, chunk: int) -> Tensor:
    """Returns [B, T] of bool: whether a position belongs to the document that its chunk of `chunk` positions began in.

    That is the document of the position before the chunk; the first chunk's is the row's first.
    """
    before = torch.cat((ids[:, :1], ids[:, chunk - 1 : -1 : chunk]), dim=1)
    return ids == before.repeat_interleave(chunk, dim=1)[:, : ids.shape[1]]
