"""Rows without end from windows of neighbouring documents: for data that is streamed, or still being prepared.

A window is as many neighbouring documents as fill some hundred rows; they are packed among themselves and shuffled
within it, so that a row depends on its window alone. A place in such a stream is a few integers: the pass over the
data, where the window begins, and how many of its rows are taken.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stoker.data.collate import Example
from stoker.data.pack import next_fit, pack
from stoker.data.shuffle import shuffled
from stoker.errors import DataError

Place = tuple[int, ...]
"""Where a window begins; the first integer is the pass over the data."""


@dataclass(frozen=True)
class Window:
    """Neighbouring examples, and the place where they begin."""

    place: Place
    examples: Sequence[Example]


class Windows(Protocol):
    """Data as windows: the same ones from the same place, whenever and however often they are read."""

    @property
    def beginning(self) -> Place:
        """The place of the first window."""
        ...

    def read(self, place: Place) -> Iterator[Window]:
        """Yields the windows from a place on, pass after pass, without end."""
        ...


class RowStream:
    """The packed rows of windows, one after the other.

    `capacity` is the tokens of a packed row; None makes a row of each example. Without `shuffle` rows keep the data's
    order. With `ahead`, the next window is fetched in a thread while rows of this one are used. Raises DataError after
    a whole pass without a trained token.
    """

    def __init__(
        self, windows: Windows, *, seed: int, salt: int, capacity: int | None, shuffle: bool = True, ahead: bool = False
    ) -> None:
        self._windows = windows
        self._key = (seed, salt)
        self._capacity = capacity
        self._shuffle = shuffle
        self._ahead = ahead
        self._place: Place = windows.beginning
        self._rows: list[list[Example]] | None = None
        self._taken = 0
        self._iterator: Iterator[Window] | None = None
        self.num_tokens = self.num_rows = 0

    @property
    def position(self) -> list[int]:
        """Where the next row stands."""
        return [*self._place, self._taken]

    def seek(self, position: Sequence[int]) -> None:
        """Goes to where `position` was taken."""
        self.close()
        *place, self._taken = position
        self._place, self._rows = tuple(place), None

    def next(self) -> list[Example]:
        """Returns the next row: its examples."""
        if self._rows is None:
            self._fetch(self._taken)
        assert self._rows is not None
        first_pass = self._place[0]
        while self._taken >= len(self._rows):
            self._fetch(0)
            if self._place[0] > first_pass + 1:
                raise DataError(
                    "no document has a trained token, so there is nothing to learn from.",
                    fix="Look at the rows with `stoker inspect`; data.train_on may name roles that the data does not "
                    "have.",
                )
        row = self._rows[self._taken]
        self._taken += 1
        self.num_rows += 1
        self.num_tokens += _tokens(row)
        return row

    @property
    def efficiency(self) -> float:
        """Share of the rows' positions so far that hold a token; 1.0 without packing."""
        if self._capacity is None or not self.num_rows:
            return 1.0
        return self.num_tokens / (self.num_rows * self._capacity)

    def close(self) -> None:
        """Stops fetching."""
        if self._iterator is not None:
            self._iterator.close()  # type: ignore[attr-defined]
            self._iterator = None

    def _fetch(self, taken: int) -> None:
        if self._iterator is None:
            windows = self._windows.read(self._place)
            self._iterator = _fetched_ahead(windows) if self._ahead else windows
        window = next(self._iterator)
        self._place, self._rows, self._taken = window.place, self._arranged(window), taken

    def _arranged(self, window: Window) -> list[list[Example]]:
        """Returns the window's rows: a function of the window and its place alone."""
        examples = [example for example in window.examples if any(mask.any() for _, mask in example)]
        if not examples:
            return []
        if self._shuffle:
            order = shuffled(np.arange(len(examples)), len(examples), *self._key, *window.place, 0)
            examples = [examples[index] for index in order.tolist()]
        if self._capacity is None:
            return [[example] for example in examples]
        lengths = np.array([_tokens([example]) for example in examples], dtype=np.int64)
        if not self._shuffle:
            ends = next_fit(lengths, self._capacity).tolist()
            return [examples[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        rows = pack(lengths, self._capacity)
        order = shuffled(np.arange(len(rows)), len(rows), *self._key, *window.place, 1)
        return [[examples[index] for index in rows[row]] for row in order.tolist()]


def _tokens(row: Sequence[Example]) -> int:
    return sum(len(ids) for example in row for ids, _ in example)


def _fetched_ahead(windows: Iterator[Window]) -> Iterator[Window]:
    """Yields windows that a thread fetches, one ahead of their use."""
    fetched: queue.Queue[Any] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                fetched.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def fetch() -> None:
        with closing(windows):  # type: ignore[type-var]
            try:
                for window in windows:
                    put(window)
                    if stopped.is_set():
                        return
            except BaseException as error:  # noqa: BLE001 - raised again where the window is used
                put(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        while True:
            item = fetched.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
