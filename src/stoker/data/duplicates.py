"""Exact duplicates among rows that come by in chunks, in nine to sixteen bytes of memory a row."""

import numpy as np


class Seen:
    """The 64-bit hashes seen so far, as sorted arrays of growing size.

    Among a hundred million different rows the chance that any two share a hash is about 3 in 10,000.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def repeated(self, hashes: np.ndarray) -> np.ndarray:
        """Returns for each hash (uint64) whether it came before, here or in an earlier call, and remembers it."""
        unique, firsts = np.unique(hashes, return_index=True)
        is_new = np.ones(len(unique), dtype=bool)
        for known in self._sorted:
            places = np.minimum(np.searchsorted(known, unique), len(known) - 1)
            is_new &= known[places] != unique
        repeated = np.ones(len(hashes), dtype=bool)
        repeated[firsts[is_new]] = False
        self._remember(unique[is_new])
        return repeated

    def _remember(self, hashes: np.ndarray) -> None:
        if not len(hashes):
            return
        self._sorted.append(hashes)
        # Each array is at least twice as long as the next, so there are few of them and each hash is moved few times.
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]))
