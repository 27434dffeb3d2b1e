"""Windows of documents that are made as they are needed and kept nowhere."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count

from stoker.data.collate import Example
from stoker.data.documents import RowChunk
from stoker.data.preparation import Preparation
from stoker.data.sources import BEGINNING, Position
from stoker.data.tokens import Tokens
from stoker.data.windows import Place, Window
from stoker.data.workers import Pool
from stoker.errors import DataError


class StreamedWindows:
    """Windows of at least `window_tokens` tokens from some sources of a preparation, read one after the other.

    A place is the pass, the source (counted within `numbers`), and the four integers of a place within it. Windows
    begin and end between chunks of rows, so a window is made again exactly from its place.
    """

    def __init__(self, preparation: Preparation, numbers: Sequence[int], pool: Pool, *, window_tokens: int) -> None:
        self._preparation = preparation
        self._numbers = tuple(numbers)
        self._pool = pool
        self._window_tokens = window_tokens

    @property
    def beginning(self) -> Place:
        """The first row of the first source."""
        return (0, 0, *BEGINNING)

    def read(self, place: Place) -> Iterator[Window]:
        """Yields the windows from a place on, pass after pass, without end."""
        together = self._preparation.documents_per_example
        examples: list[Example] = []
        num_tokens, start = 0, place
        for before, after, tokens in self._made(place):
            if before[0] != start[0]:  # a window holds documents of one pass
                if examples:
                    yield Window(start, examples)
                examples, num_tokens, start = [], 0, before
            examples += examples_of(tokens, together)
            num_tokens += len(tokens.ids)
            if num_tokens >= self._window_tokens:
                yield Window(start, examples)
                examples, num_tokens, start = [], 0, after

    def _made(self, place: Place) -> Iterator[tuple[Place, Place, Tokens]]:
        """Yields the documents of each chunk with the places before and after it."""
        waiting: deque[tuple[Place, Place]] = deque()

        def tasks() -> Iterator[RowChunk]:
            for chunk, before, after in self._chunks(place):
                waiting.append((before, after))
                yield chunk

        for made in self._pool.map("make", tasks()):
            yield *waiting.popleft(), made.tokens

    def _chunks(self, place: Place) -> Iterator[tuple[RowChunk, Place, Place]]:
        first_pass, first, *within = place
        at = Position(*within)
        for number in count(first_pass):
            found = first > 0 or at != BEGINNING
            for source in range(first, len(self._numbers)):
                before: Place = (number, source, *at)
                for chunk, position in self._preparation.chunks(self._numbers[source], at):
                    after = (number, source, *position)
                    yield chunk, before, after
                    before, found = after, True
                at = BEGINNING
            first, at = 0, BEGINNING
            if not found:
                raise DataError("the sources hold no rows.", where=self._preparation.label)


def examples_of(tokens: Tokens, together: int) -> list[Example]:
    """Returns the documents, in groups of so many."""
    ends = tokens.lengths.cumsum().tolist()
    documents = [
        (tokens.ids[start:end], tokens.trained[start:end]) for start, end in zip([0, *ends], ends, strict=False)
    ]
    return [documents[index : index + together] for index in range(0, len(documents), together)]
