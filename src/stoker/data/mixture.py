"""Which source each training row comes from, when sources are mixed by weight: a function of the row's number alone."""

from collections.abc import Sequence

import numpy as np

from stoker.data.shuffle import shuffled

_MAX_BLOCK = 10_000
_TOLERANCE = 1e-3


class Mixture:
    """Rows of several sources in blocks, each of which holds every source in its share, in an order drawn by `seed`.

    The block is the smallest that meets all shares within a thousandth of their size (10,000 rows at most; a source of
    a smaller share than that still gets one row of each). Raises ValueError for a weight that is not positive.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights must be positive, got {list(weights)}")
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self.counts = _block(shares)
        self._ends = np.cumsum(self.counts)
        self._seed = seed

    @property
    def block(self) -> int:
        """Rows of a block."""
        return int(self._ends[-1])

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each row, counted from 0 without end, and its number among that source's rows.

        Both int64. A source's rows are each used once, though not in their order within a block.
        """
        blocks, within = np.divmod(np.asarray(rows, dtype=np.int64), self.block)
        slots = shuffled(within, self.block, self._seed, salts=blocks)
        sources = np.searchsorted(self._ends, slots, side="right")
        firsts = self._ends[sources] - self.counts[sources]
        return sources, blocks * self.counts[sources] + slots - firsts


def _block(shares: np.ndarray) -> np.ndarray:
    """Returns how many rows of each source the block holds."""
    best, least = None, np.inf
    for size in range(len(shares), _MAX_BLOCK + 1):
        counts = np.maximum(np.rint(shares * size), 1).astype(np.int64)
        error = float(np.abs(counts / counts.sum() / shares - 1.0).max())
        if error < least:
            best, least = counts, error
        if error <= _TOLERANCE:
            break
    assert best is not None
    return best
