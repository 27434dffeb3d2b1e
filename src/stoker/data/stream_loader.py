"""Batches of an optimiser step from streams of rows: what remains to be saved is where each stream stands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stoker.data.batch import Batch
from stoker.data.collate import Collator, Example
from stoker.data.mixture import Mixture
from stoker.data.windows import RowStream


class StreamLoader:
    """Cuts endless streams of rows into optimiser steps, and those into the micro-batches of one rank.

    A step holds `batch_size` rows over all ranks; every rank has the same streams and takes its share, so the order of
    rows does not depend on how many ranks there are. With several streams, `weights` says in which shares they take
    turns. `steps_per_epoch` is what the run counts as an epoch: all of it, since nobody knows how many rows there are.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        *,
        collator: Collator,
        batch_size: int,
        seed: int,
        steps_per_epoch: int,
        weights: Sequence[float] | None = None,
        sample: Sequence[Batch] = (),
        on_close: tuple[Callable[[], None], Callable[[], None]] = (lambda: None, lambda: None),
    ) -> None:
        if (1 if weights is None else len(weights)) != len(streams):
            raise ValueError(f"{len(streams)} streams and weights {weights}")
        self._streams = tuple(streams)
        self._mixture = None if weights is None else Mixture(weights, seed=seed)
        self._collator = collator
        self._sample = tuple(sample)
        self._on_close = on_close
        self._next = 0
        self._beginning = [stream.position for stream in streams]
        self.batch_size = batch_size
        self.packing = collator.packing
        self.steps_per_epoch = steps_per_epoch

    @property
    def padding_share(self) -> float:
        """Share of padding in the packed rows so far."""
        tokens = sum(stream.efficiency * stream.num_rows for stream in self._streams)
        return 1.0 - tokens / max(1, sum(stream.num_rows for stream in self._streams)) if self.packing else 0.0

    def step(self, index: int) -> list[Batch]:
        """Returns this rank's micro-batches of optimiser step `index`.

        Steps are meant to be taken in turn. One further on is reached by reading up to it, one further back from the
        beginning; `seek` goes anywhere at once.
        """
        if index < self._next:
            self.seek(0, {"streams": self._beginning})
        while self._next < index:
            self._take()
        rows = self._take()
        if not self.packing:
            rows = sorted(rows, key=lambda row: -sum(len(ids) for ids, _ in row[0]))
        return list(self._collator.batches(rows, lambda example: example))

    def position(self) -> dict[str, Any]:
        """Returns where the next step stands: a few integers."""
        return {"streams": [stream.position for stream in self._streams]}

    def seek(self, index: int, position: Mapping[str, Any]) -> None:
        """Goes to where `position` was taken, before step `index`."""
        for stream, place in zip(self._streams, position["streams"], strict=True):
            stream.seek(place)
        self._next = index

    def all(self) -> Iterator[Batch]:
        """Yields the batches of the sample: the first rows of the data."""
        yield from self._sample

    def close(self) -> None:
        """Stops reading; calls the first of `on_close` before and the second afterwards."""
        before, afterwards = self._on_close
        before()
        for stream in self._streams:
            stream.close()
        afterwards()

    def _take(self) -> list[list[Example]]:
        first = self._next * self.batch_size
        self._next += 1
        if self._mixture is None:
            return [self._streams[0].next() for _ in range(self.batch_size)]
        sources, _ = self._mixture.locate(np.arange(first, first + self.batch_size))
        return [self._streams[source].next() for source in sources.tolist()]
