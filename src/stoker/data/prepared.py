"""Tokenised documents, in memory or mapped from the cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from stoker.data.audit import Audit


@dataclass(frozen=True)
class Prepared:
    """Documents laid end to end, with what was counted while making them.

    - `ids`: uint32 `[tokens]`; `trained`: bool `[tokens]`, whether the token is a target (never a document's first).
    - `offsets`: int64 `[documents + 1]`, where each document starts.
    - `notices`: sentences for the user (a rebuilt cache). `cached`: whether the arrays came from the cache.
    - `documents_per_example`: how many neighbours stay together: 1, or 2 for pairs (chosen, rejected).
    - `source_starts`: the first document of each source.
    - `labels`: int8 `[tokens]`, -1 where a token has none; None if no document has labels.
    - `folder`: where the cache keeps the documents.
    - `trained_per_document`: what `trained_counts` returns where it is known already, as from the cache.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    audit: Audit
    notices: tuple[str, ...] = ()
    cached: bool = False
    documents_per_example: int = 1
    source_starts: tuple[int, ...] = (0,)
    trained_per_document: np.ndarray | None = None
    labels: np.ndarray | None = None
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `(ids, trained)` of one document: uint32 and bool, views of the whole."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.trained[start:end]

    def labels_of(self, index: int) -> np.ndarray | None:
        """Returns the labels of one document, int8 `[tokens]`, -1 where a token has none; None if there are none."""
        return None if self.labels is None else self.labels[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.diff(self.offsets)

    @cached_property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each document, int64."""
        if self.trained_per_document is not None:
            return np.asarray(self.trained_per_document, dtype=np.int64)
        sums = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[tuple[Sequence[int], Sequence[bool]]],
        audit: Audit | None = None,
        *,
        documents_per_example: int = 1,
        source_starts: tuple[int, ...] = (0,),
    ) -> "Prepared":
        """Returns documents given as `(ids, trained)` pairs, for notebooks and tests."""
        lengths = [len(ids) for ids, _ in documents]
        ids = np.fromiter((token for document, _ in documents for token in document), np.uint32, sum(lengths))
        trained = np.fromiter((flag for _, mask in documents for flag in mask), np.bool_, sum(lengths))
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        trained[offsets[:-1][np.diff(offsets) > 0]] = False
        counted = audit or Audit(
            rows=len(lengths),
            documents=len(lengths),
            tokens=len(ids),
            trained_tokens=int(trained.sum()),
            longest=max(lengths, default=0),
        )
        return cls(
            ids,
            trained,
            offsets,
            counted,
            documents_per_example=documents_per_example,
            source_starts=source_starts,
        )


@dataclass(frozen=True)
class Selection:
    """Some documents of a `Prepared`, by index: what `split` returns; `is_held_out`: the others are to train on."""

    whole: Prepared
    indices: np.ndarray
    notices: tuple[str, ...] = ()
    is_held_out: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `(ids, trained)` of the selection's document `index`."""
        return self.whole.document(int(self.indices[index]))

    def labels_of(self, index: int) -> np.ndarray | None:
        """Returns the labels of the selection's document `index`, None if there are none."""
        return self.whole.labels_of(int(self.indices[index]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return self.whole.lengths[self.indices]

    @cached_property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each document, int64."""
        return self.whole.trained_counts[self.indices]

    @property
    def documents_per_example(self) -> int:
        """As of the whole; a selection holds whole examples."""
        return self.whole.documents_per_example

    @property
    def source_starts(self) -> tuple[int, ...]:
        """The first document of each source, counted within the selection."""
        return tuple(np.searchsorted(self.indices, self.whole.source_starts).tolist())

    @property
    def audit(self) -> Audit:
        """Counts of this part's documents and tokens.

        What was counted of rows, messages and turns is known of the whole alone: the part to train on has it, and says
        by `held_out` that it is of both; the part that is held out is without.
        """
        lengths, counted = self.lengths, self.whole.audit
        if self.is_held_out:
            is_told = counted.rows * self.documents_per_example == counted.documents  # no row was cut into several
            counted = Audit(
                rows=len(self) // self.documents_per_example if is_told else 0,
                train_on=counted.train_on,
                formats=counted.formats,
                template=counted.template,
                row_kind=counted.row_kind,
            )
        else:
            counted = replace(counted, held_out=len(self.whole) - len(self), untrained_examples=())
        return replace(
            counted,
            documents=len(self),
            tokens=int(lengths.sum()),
            trained_tokens=int(self.trained_counts.sum()),
            longest=int(lengths.max(initial=0)),
            median=int(np.median(lengths)) if len(lengths) else 0,
            rows_without_trained_token=int((self.trained_counts == 0).sum()),
        )
