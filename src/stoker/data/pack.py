"""Packing documents into rows of a fixed token budget, and cutting those that are longer."""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Returns rows of document indices whose lengths sum to at most `capacity`: best-fit decreasing.

    Longest first, each document goes into the fullest row that still has room; documents of equal length keep their
    order. The number of rows is at most 11/9 of the optimum plus one (Johnson, 1973) and depends on the lengths alone.
    Raises ValueError for a length above `capacity` or below one.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.max() > capacity or sizes.min() < 1):
        raise ValueError(f"lengths must lie between 1 and {capacity}, got {sizes.min()} to {sizes.max()}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r of `room` is set while some row has exactly r free tokens: the best fit is the lowest bit from `size` up,
    # which big-integer arithmetic finds in capacity / 64 machine words.
    room = 0
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = room >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = with_room[free].pop()
            if not with_room[free]:
                room ^= 1 << free
            rows[row].append(index)
        else:
            free, row = capacity, len(rows)
            rows.append([index])
        left = free - size
        if left:
            with_room[left].append(row)
            room |= 1 << left
    return rows


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
