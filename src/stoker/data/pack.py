"""Packing documents into rows of a fixed token budget, and cutting those that are longer.

Best-fit decreasing puts documents of one length, one after the other, into the rows that have the least room left for
them. Rows that hold the same lengths are alike, so they are kept as one group with a count and filled together: the
work grows with the number of different lengths and fillings, not with the number of documents (ten million log-normal
lengths take a fraction of a second).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Group:
    """`num_rows` rows alike: of each `(length, copies, first)`, row i holds the documents `first + i * copies`, ..."""

    num_rows: int
    parts: tuple[tuple[int, int, int], ...]

    def cut(self, start: int, num_rows: int) -> "_Group":
        """Returns the rows from number `start` on as a group of their own."""
        parts = tuple((length, copies, first + start * copies) for length, copies, first in self.parts)
        return _Group(num_rows, parts)


class Layout:
    """Which documents, by rank within their length, stand in each packed row.

    The number of rows is at most 11/9 of the optimum plus one (Johnson, 1973) and depends on the lengths alone. Raises
    ValueError for a length above `capacity` or below one.
    """

    def __init__(self, lengths: np.ndarray, capacity: int) -> None:
        sizes = np.asarray(lengths, dtype=np.int64)
        if sizes.size and (sizes.max() > capacity or sizes.min() < 1):
            raise ValueError(f"lengths must lie between 1 and {capacity}, got {sizes.min()} to {sizes.max()}")
        self.capacity = capacity
        self.num_tokens = int(sizes.sum())
        self._counts = np.bincount(sizes, minlength=capacity + 1)
        self._groups = _best_fit(self._counts, capacity)
        self._starts = np.concatenate([[0], np.cumsum([group.num_rows for group in self._groups], dtype=np.int64)])
        # Documents of length L have the ranks before_length[L], ... when all are sorted by falling length.
        self.before_length = len(sizes) - np.cumsum(self._counts)

    def __len__(self) -> int:
        """Rows."""
        return int(self._starts[-1])

    @property
    def efficiency(self) -> float:
        """Share of the rows' positions that hold a token; 1.0 without rows."""
        return self.num_tokens / (len(self) * self.capacity) if len(self) else 1.0

    @property
    def counts(self) -> np.ndarray:
        """How many documents have each length, int64 `[capacity + 1]`."""
        return self._counts

    def row(self, index: int) -> list[tuple[int, int]]:
        """Returns `(length, number)` of each document in a row; the number counts the documents of that length."""
        found = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = index - int(self._starts[found])
        return [
            (length, first + within * copies + copy)
            for length, copies, first in self._groups[found].parts
            for copy in range(copies)
        ]


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Returns rows of document indices whose lengths sum to at most `capacity`: best-fit decreasing.

    Longest first, each document goes into the fullest row that still has room; documents of equal length keep their
    order. Raises ValueError for a length above `capacity` or below one.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    layout = Layout(sizes, capacity)
    by_length = np.argsort(-sizes, kind="stable").tolist()
    before = layout.before_length.tolist()
    return [
        [by_length[before[length] + number] for length, number in layout.row(index)] for index in range(len(layout))
    ]


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns where each row of neighbours ends, int64: as many as fit, then the next row. Keeps the order."""
    totals = np.concatenate([[0], np.cumsum(lengths)])
    ends, start = [], 0
    while start < len(lengths):
        start = int(np.searchsorted(totals, totals[start] + capacity, side="right")) - 1
        ends.append(start)
    return np.array(ends, dtype=np.int64)


def _best_fit(counts: np.ndarray, capacity: int) -> list[_Group]:
    """Returns the groups of rows that best-fit decreasing gives for `counts[length]` documents of each length."""
    full: list[_Group] = []
    with_room: list[list[_Group]] = [[] for _ in range(capacity + 1)]
    # Bit r of `room` is set while some row has exactly r free tokens: the best fit is the lowest bit from `length` up,
    # which big-integer arithmetic finds in capacity / 64 machine words.
    room = 0
    for length in reversed(np.flatnonzero(counts).tolist()):
        taken, count = 0, int(counts[length])
        while taken < count:
            fitting = room >> length
            free = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            group = with_room[free].pop() if fitting else _Group(count, ())  # as many new rows as could be needed
            if fitting and not with_room[free]:
                room ^= 1 << free
            filled, rest, taken = _fill(group, length, free // length, taken, count)
            for one in filled:
                left = free - length * one.parts[-1][1]
                (with_room[left] if left else full).append(one)
                room |= (1 << left) if left else 0
            if fitting and rest is not None:
                with_room[free].append(rest)
                room |= 1 << free
    return full + [group for groups in with_room for group in groups]


def _fill(group: _Group, length: int, most: int, taken: int, count: int) -> tuple[list[_Group], _Group | None, int]:
    """Puts the documents number `taken` to `count` of one length into the rows of a group, `most` into each.

    Returns the rows that took some (the last of them may have got fewer), those that took none, and the new `taken`.
    """
    num_full = min(group.num_rows, (count - taken) // most)
    filled = []
    if num_full:
        rows = group.cut(0, num_full)
        filled.append(_Group(num_full, (*rows.parts, (length, most, taken))))
        taken += num_full * most
    used = num_full
    if used < group.num_rows and taken < count:
        rows = group.cut(used, 1)
        filled.append(_Group(1, (*rows.parts, (length, count - taken, taken))))
        taken, used = count, used + 1
    rest = group.cut(used, group.num_rows - used) if used < group.num_rows else None
    return filled, rest, taken


def split_long(ids: np.ndarray, trained: np.ndarray, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns `(ids, trained)` pieces of at most `limit` tokens, each beginning with the last token of the one before.

    The shared token makes every token but the first a target exactly once. `limit` is at least two.
    """
    if limit < 2:
        raise ValueError(f"limit must be at least 2 tokens, got {limit}")
    if len(ids) <= limit:
        return [(ids, trained)]
    pieces = []
    for start in range(0, len(ids) - 1, limit - 1):
        mask = trained[start : start + limit].copy()
        mask[0] = False
        pieces.append((ids[start : start + limit], mask))
    return pieces
