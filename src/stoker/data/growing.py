"""Windows of documents from the cache, while whoever holds its lock is still writing them."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from stoker.data.prepared import Prepared
from stoker.data.streaming import examples_of
from stoker.data.tokens import Tokens
from stoker.data.windows import Place, Window
from stoker.data.writers import PROGRESS, partial_of
from stoker.errors import DataError

_POLL_SECONDS = 0.05


class GrowingWindows:
    """Windows of at least `window_tokens` tokens from prepared documents, in their order.

    `prepare` makes them (or waits for the process that does) and returns them whole; it runs in a thread, and what it
    raises is raised where a window is asked for. Meanwhile windows come from the half-written `folder` as soon as they
    are there. Documents are the same whoever writes them, and whether or not they were there before, and so are
    windows. A place is the pass and the number of the window's first document.
    """

    def __init__(
        self, prepare: Callable[[], Prepared], folder: Path, *, window_tokens: int, documents_per_example: int
    ) -> None:
        self._prepare = prepare
        self._partial = partial_of(folder)
        self._window_tokens = window_tokens
        self._together = documents_per_example
        self._whole: Prepared | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def beginning(self) -> Place:
        """The first document."""
        return (0, 0)

    @property
    def whole(self) -> Prepared | None:
        """Everything, once it is prepared."""
        return self._whole

    def wait(self) -> Prepared:
        """Returns everything when it is prepared."""
        self._thread.join()
        self._raise_error()
        assert self._whole is not None
        return self._whole

    def join(self, seconds: float) -> None:
        """Waits so long for the preparation to end, whatever comes of it."""
        self._thread.join(seconds)

    def read(self, place: Place) -> Iterator[Window]:
        """Yields the windows from a place on, pass after pass, without end; waits for documents that are not there."""
        first_pass, first = place
        for number in count(first_pass):
            while (stop := self._end_of_window(first)) is not None:
                yield Window((number, first), examples_of(self._documents(first, stop), self._together))
                first = stop
            if first == 0:
                raise DataError("no row is left to train on.", fix="Every row was malformed or too long.")
            first = 0

    def _run(self) -> None:
        try:
            self._whole = self._prepare()
        except BaseException as error:  # noqa: BLE001 - raised again where a window is asked for
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _end_of_window(self, first: int) -> int | None:
        """Returns the document after the window's last; None if `first` is the end of the data."""
        seen, tokens = first, 0
        while True:
            offsets, is_all = self._offsets(seen)
            new = len(offsets) - 1
            ends = tokens + offsets[1:] - offsets[0] if new > 0 else np.empty(0, dtype=np.int64)
            reach = int(np.searchsorted(ends, self._window_tokens))
            stop = seen + reach + 1
            stop += (first - stop) % self._together  # whole examples
            if reach < new and stop <= seen + new:
                return stop
            if is_all:
                end = seen + max(new, 0)
                return end if end > first else None
            self._raise_error()
            time.sleep(_POLL_SECONDS)

    def _offsets(self, first: int) -> tuple[np.ndarray, bool]:
        """Returns where the documents that are there from `first` on start and end, and whether these are all."""
        if self._whole is not None:
            return self._whole.offsets[first:], True
        try:
            progress = json.loads((self._partial / PROGRESS).read_text(encoding="utf-8"))
            documents = int(progress["documents"])
            if documents < first:  # another process has begun anew, after the first one died
                return np.empty(0, dtype=np.int64), False
            return _slice(self._partial / "offsets", np.int64, first, documents + 1), False
        except (OSError, ValueError):  # not begun, or whole in the meantime
            return np.empty(0, dtype=np.int64), False

    def _documents(self, start: int, stop: int) -> Tokens:
        while True:
            if self._whole is not None:
                offsets = np.asarray(self._whole.offsets[start : stop + 1])
                part = slice(int(offsets[0]), int(offsets[-1]))
                return Tokens(np.array(self._whole.ids[part]), np.array(self._whole.trained[part]), np.diff(offsets))
            try:
                offsets = _slice(self._partial / "offsets", np.int64, start, stop + 1)
                first, last = int(offsets[0]), int(offsets[-1])
                ids = _slice(self._partial / "ids", np.uint32, first, last)
                trained = _slice(self._partial / "trained", np.bool_, first, last)
                if len(offsets) == stop + 1 - start and len(ids) == len(trained) == last - first:
                    return Tokens(ids, trained, np.diff(offsets))
            except (OSError, ValueError, IndexError):  # renamed or begun anew between two reads
                pass
            self._raise_error()
            time.sleep(_POLL_SECONDS)


def _slice(path: Path, dtype: type[np.generic], start: int, stop: int) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return np.fromfile(path, dtype=dtype, count=stop - start, offset=start * size)
