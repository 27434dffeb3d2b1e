"""Which rows of a source are read: a slice of its split, the first so many, one shard of several."""

import re
from dataclasses import dataclass

from stoker.errors import DataError

_SLICE = re.compile(r"(?P<name>[\w.-]+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Split:
    """A split's name and the rows of it: from `start` up to before `stop`, each a row number or a percentage ("20%").

    Negative ones count from the end; None is the split's own end.
    """

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether no slice was asked for."""
        return self.start is None and self.stop is None

    @property
    def needs_total(self) -> bool:
        """Whether the slice means nothing until the rows are counted."""
        return any(edge is not None and ("%" in edge or edge.startswith("-")) for edge in (self.start, self.stop))

    def bounds(self, total: int | None) -> tuple[int, int | None]:
        """Returns the first row number and the one after the last (None: no end); `total` if `needs_total`."""
        start = 0 if self.start is None else _edge(self.start, total)
        stop = None if self.stop is None else _edge(self.stop, total)
        return start, stop


def read_split(text: str, where: str) -> Split:
    """Returns what `train`, `train[:20%]`, `train[100:200]` and the like name. Raises DataError for anything else."""
    if _NAME.fullmatch(text):
        return Split(text)
    found = _SLICE.fullmatch(text.replace(" ", ""))
    if not found:
        raise DataError(
            f"split = {text!r} is not a split.",
            where=where,
            fix="Write a name, or a name and a slice: train, train[:20%], train[1000:2000], train[-10%:]. Several "
            "splits are several sources.",
        )
    for edge in (found["start"], found["stop"]):
        if edge and edge.endswith("%") and abs(int(edge[:-1])) > 100:
            raise DataError(f"split = {text!r} asks for {edge} of the rows.", where=where, fix="Use 100% at most.")
    return Split(found["name"], found["start"], found["stop"])


@dataclass(frozen=True)
class Selection:
    """The rows of a source, by number from 0: from `start` up to before `stop`, each `num_shards`-th of them from the
    one with number `shard` on, and `limit` of these at most."""

    start: int = 0
    stop: int | None = None
    shard: int = 0
    num_shards: int = 1
    limit: int | None = None

    @property
    def end(self) -> int | None:
        """The row number from which on none is taken; None if there is no such."""
        ends = [] if self.stop is None else [self.stop]
        if self.limit is not None:
            ends.append(self.start + self.shard + self.limit * self.num_shards)
        return min(ends, default=None)

    def takes(self, number: int) -> bool:
        """Whether row `number` is taken."""
        end = self.end
        within = number - self.start
        return within >= 0 and (end is None or number < end) and within % self.num_shards == self.shard


def _edge(text: str, total: int | None) -> int:
    """Percentages are rounded to the nearest row, as the datasets library does."""
    if text.endswith("%"):
        assert total is not None
        value = round(int(text[:-1]) * total / 100)
    else:
        value = int(text)
    if value < 0:
        assert total is not None
        value += total
    return max(0, value if total is None else min(value, total))
