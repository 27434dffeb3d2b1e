"""Which micro-batches one CUDA graph replays: those of its shape, or that fit into it.

Rows of one document each need no more than their length, rounded up. Packed rows differ in their documents, too. So a
graph has room for some number of them, what is left over being empty documents, and bounds how long one may be.

Which positions are trained differs in all rows: through the head run as many as a graph has room for.

Room costs time: attention launches a block for every 128 positions of `longest` in every document and head, and one
that finds nothing there ends at once, after a microsecond or so in which it held a place on the GPU; and a position
more through the head is as much work as a trained one. So the first graph has room for nearly all that will come, and
closer ones are captured for what comes again.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

BUCKET_TOKENS = 64
"""Lengths of rows of one document are rounded up to a multiple of this."""

SPARE = 1.5
"""Blocks of attention that a graph may launch for one that a batch needs, before a closer graph is worth capturing."""

_BLOCK = 128  # queries that flash attention handles at once
_FEWEST = 4  # documents that there is always room for
_MULTIPLE = 16  # of positions through the head: Triton has kernels of their own for other numbers
# 128 positions through the head against a block of attention in every layer and head: 0.2 ms to 10 us in a 1B.
_HEAD_BLOCKS = 20


class GraphShape(NamedTuple):
    """What a graph is captured for, or what a batch takes.

    `rows` of `length` positions, of which so many are `trained`; of packed rows also how many `documents` they hold and
    the `longest` of them, in positions. No documents: rows are not packed.
    """

    rows: int
    length: int
    trained: int
    documents: int = 0
    longest: int = 0

    @property
    def positions(self) -> int:
        """Of all rows."""
        return self.rows * self.length

    @property
    def blocks(self) -> int:
        """Blocks that attention launches for a head."""
        return self.documents * -(-self.longest // _BLOCK)

    @property
    def cost(self) -> float:
        """What the room costs, in attention's blocks."""
        return self.blocks + _HEAD_BLOCKS * self.trained / _BLOCK

    def rounded(self) -> "GraphShape":
        """Returns the shape with some room, so that batches which come again fit into few."""
        eighth = -(-self.positions // (8 * _MULTIPLE)) * _MULTIPLE
        shape = self._replace(trained=min(max(1, -(-self.trained // eighth)) * eighth, self.positions))
        if not self.documents:
            return shape
        longest = _in_halves(self.longest, _BLOCK)
        return shape._replace(documents=_in_halves(self.documents, _FEWEST), longest=min(longest, self.length))

    def roomy(self) -> "GraphShape":
        """Returns the shape with room for half as many documents again, of any length, with all positions trained."""
        return self._replace(
            trained=self.positions, documents=self.documents * 3 // 2, longest=self.documents and self.length
        ).rounded()

    def holds(self, other: "GraphShape") -> bool:
        """Whether a graph of this shape can replay a batch of the other one."""
        is_same = self[:2] == other[:2] and bool(self.documents) == bool(other.documents)
        return is_same and all(mine >= its for mine, its in zip(self[2:], other[2:], strict=True))


def shape_of(
    rows: int, length: int, num_trained: int, document_lengths: Sequence[Sequence[int]] | None = None
) -> GraphShape:
    """Returns what a batch takes."""
    if document_lengths is None:
        return GraphShape(rows, length, num_trained)
    count = sum(len(row) for row in document_lengths)
    return GraphShape(rows, length, num_trained, count, max(size for row in document_lengths for size in row))


def closest(wanted: GraphShape, captured: Collection[GraphShape]) -> GraphShape | None:
    """Returns the captured shape that holds what a batch takes at the least cost; None if none does."""
    return min((shape for shape in captured if shape.holds(wanted)), key=lambda shape: shape.cost, default=None)


def is_close(found: GraphShape, wanted: GraphShape) -> bool:
    """Whether a graph does hardly more for a batch than it needs.

    That is, in attention `SPARE` times its blocks, or a block more for each 128 positions; and through the head a
    quarter of all positions more. None is closer than the batch's own shape, rounded.
    """
    own = wanted.rounded()
    spare = max(SPARE * wanted.blocks, wanted.blocks + wanted.positions / _BLOCK)
    has_blocks = found.blocks <= max(spare, own.blocks)
    return has_blocks and found.trained <= max(wanted.trained + wanted.positions / 4, own.trained)


def ends_of(document_lengths: Sequence[Sequence[int]], room: int) -> list[int]:
    """Returns where each document begins in rows laid end to end, and where the last one ends, for `room` documents.

    Those that are missing are empty ones at the end: [room + 1]. Raises ValueError if there are more.
    """
    ends = [0]
    for row in document_lengths:
        for size in row:
            ends.append(ends[-1] + size)
    if len(ends) > room + 1:
        raise ValueError(f"{len(ends) - 1} documents where there is room for {room}")
    return ends + [ends[-1]] * (room + 1 - len(ends))


def _in_halves(count: int, least: int) -> int:
    """`count` rounded up to `least` times 1, 2, 3, 4, 6, 8, 12, 16, ...: by half at most, above `least`."""
    step = max(least, (1 << (count - 1).bit_length()) // 4)
    return -(-count // step) * step
