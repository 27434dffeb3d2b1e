"""Tokenised documents laid end to end, as they pass from whoever made them to whoever keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Some documents: `ids` uint32 `[tokens]`, `trained` bool `[tokens]`, `lengths` int64 `[documents]`.

    `labels`: int8 `[tokens]`, -1 where a token has none; None if no document has labels.
    """

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, documents: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> "Tokens":
        """Returns `(ids, trained, labels)` documents laid end to end."""
        has_labels = any(labels is not None for _, _, labels in documents)
        return cls(
            ids=np.concatenate([np.empty(0, np.uint32), *(ids for ids, _, _ in documents)]).astype(np.uint32),
            trained=np.concatenate([np.empty(0, np.bool_), *(trained for _, trained, _ in documents)]),
            lengths=np.array([len(ids) for ids, _, _ in documents], dtype=np.int64),
            labels=np.concatenate([_labels(ids, labels) for ids, _, labels in documents]) if has_labels else None,
        )

    @property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each document, uint32."""
        sums = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        ends = np.cumsum(self.lengths)
        return (sums[ends] - sums[ends - self.lengths]).astype(np.uint32)


def _labels(ids: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    return np.full(len(ids), -1, dtype=np.int8) if labels is None else labels.astype(np.int8)
