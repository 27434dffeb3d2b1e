"""A micro-batch: token ids, what each position must predict, and where documents end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with their targets.

    - `input_ids`: int64 `[B, T]`.
    - `targets`: int64 `[B, T]`; the token that position t must predict, or -100. Already shifted.
    - `document_lengths`: per row the lengths of its documents, summing to T; a padded tail is a document of its own
      whose targets are all -100. None: every row is one document, padded on the right.
    - `num_tokens`: tokens that are not padding. `num_trained_tokens`: targets that are not -100.
    - `row_tokens`: `num_tokens` by row; None if the rows hold equally many (within rounding).
    - `documents_per_example`: 1, or 2 if documents come in pairs (chosen, rejected): neighbours in a packed row, or
      neighbouring rows. A split keeps them together.
    """

    input_ids: Tensor
    targets: Tensor
    document_lengths: tuple[tuple[int, ...], ...] | None
    num_tokens: int
    num_trained_tokens: int
    row_tokens: tuple[int, ...] | None = None
    documents_per_example: int = 1

    @property
    def num_rows(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    @property
    def can_split(self) -> bool:
        """Whether `split` can make two smaller batches: rows of several examples, or one row of several."""
        return self.num_rows > self._rows_per_example or (
            self.document_lengths is not None
            and len(self.document_lengths[0]) > self.documents_per_example
            and sum(self.document_lengths[0]) == self.input_ids.shape[1]  # not a part of a row
        )

    @property
    def _rows_per_example(self) -> int:
        return 1 if self.document_lengths is not None else self.documents_per_example

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Returns the batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )

    def padded_to(self, length: int) -> "Batch":
        """Returns the batch with rows of `length` positions, padded on the right with tokens that train nothing.

        For rows of one document each. Raises ValueError if they are packed, or longer.
        """
        rows, width = self.input_ids.shape
        if self.document_lengths is not None or width > length:
            raise ValueError(f"a batch of width {width} cannot be padded to {length}, or its rows are packed")
        if width == length:
            return self
        return replace(
            self,
            input_ids=nn.functional.pad(self.input_ids, (0, length - width)),
            targets=nn.functional.pad(self.targets, (0, length - width), value=IGNORED),
            row_tokens=self.row_tokens or (self.num_tokens // rows,) * rows,
        )

    def shortened(self, num_rows: int = 2, length: int = 1024) -> "Batch":
        """Returns a stand-in for a step whose results do not count: about `num_rows` rows of about `length` positions.

        Kernels compiled for it are those of this batch: lengths and positions in all are the same modulo 16 (Triton
        compiles for multiples of 16, and for 1), which may take more rows; one row stays one. Rows of several documents
        keep as many as 16, shorter. Where something is trained, so are targets here, of the same values; in a row that
        is cut they are put elsewhere. Token ids are those of the row's beginning.
        """
        width = self.input_ids.shape[1]
        unit = self._rows_per_example
        rows = min(-(-num_rows // unit) * unit, self.num_rows)
        width = width if width <= length else length - (length - width) % 16
        fewer = range(rows, self.num_rows, unit)
        rows = next((count for count in fewer if (count - self.num_rows) * width % 16 == 0), self.num_rows)
        if (rows, width) == tuple(self.input_ids.shape):
            return self
        ids = self.input_ids[:rows, :width].contiguous()
        targets = self._some_targets(rows, width)
        documents = self.document_lengths
        if documents is not None and width < self.input_ids.shape[1]:
            documents = tuple(_even_lengths(width, row, self.documents_per_example) for row in documents[:rows])
        return replace(
            self,
            input_ids=ids,
            targets=targets,
            document_lengths=None if documents is None else documents[:rows],
            num_tokens=ids.numel(),
            num_trained_tokens=int((targets != IGNORED).sum()),
            row_tokens=None,
        )

    def _some_targets(self, rows: int, width: int) -> Tensor:
        """Targets `[rows, width]` of values that are there: all of them or, where not all are, every other one."""
        trained = self.targets[self.targets != IGNORED]
        targets = torch.full((rows, width), IGNORED, dtype=self.targets.dtype, device=self.targets.device)
        if trained.numel():
            step = 1 if trained.numel() == self.targets.numel() else 2
            places = targets[:, step - 1 :: step]
            index = torch.arange(places.numel(), device=targets.device) % trained.numel()
            places.copy_(trained[index].view_as(places))
        return targets

    def part(self, index: int, count: int) -> "Batch":
        """Returns part `index` of `count` of every row, for ranks that share rows; `document_lengths` stay whole rows'.

        Rows whose length `count` does not divide are padded on the right first. Together the parts hold the same
        targets. A part of one row cannot be split.
        """
        rows, width = self.input_ids.shape
        length = -(-width // count)
        missing = length * count - width
        documents = self.document_lengths
        if documents is not None and missing:
            documents = tuple((*row, missing) for row in documents)
        ids = nn.functional.pad(self.input_ids, (0, missing))
        targets = nn.functional.pad(self.targets, (0, missing), value=IGNORED)
        start = index * length
        targets = targets[:, start : start + length].contiguous()
        whole = self.row_tokens or (self.num_tokens // rows,) * rows
        row_tokens = tuple(min(max(tokens - start, 0), length) for tokens in whole)
        return replace(
            self,
            input_ids=ids[:, start : start + length].contiguous(),
            targets=targets,
            document_lengths=documents,
            num_tokens=sum(row_tokens),
            num_trained_tokens=int((targets != IGNORED).sum()),
            row_tokens=row_tokens,
        )

    def split(self) -> "list[Batch]":
        """Returns two batches with half of the rows each; a single packed row is cut between two of its examples.

        Together they hold the same targets, so their summed losses and gradients equal this batch's. Raises
        ValueError if there is nothing to cut (see `can_split`).
        """
        if not self.can_split:
            raise ValueError("A batch of one document cannot be split.")
        unit = self._rows_per_example
        if self.num_rows > unit:
            half = (self.num_rows // unit + 1) // 2 * unit
            return [self._rows(0, half), self._rows(half, self.num_rows)]
        return self._cut_row()

    def _rows(self, start: int, end: int) -> "Batch":
        targets = self.targets[start:end]
        if self.row_tokens is not None:
            row_tokens = self.row_tokens[start:end]
            num_tokens = sum(row_tokens)
        else:
            row_tokens = None
            num_tokens = self.num_tokens * end // self.num_rows - self.num_tokens * start // self.num_rows
        return Batch(
            input_ids=self.input_ids[start:end],
            targets=targets,
            document_lengths=None if self.document_lengths is None else self.document_lengths[start:end],
            num_tokens=num_tokens,
            num_trained_tokens=int((targets != IGNORED).sum()),
            row_tokens=row_tokens,
            documents_per_example=self.documents_per_example,
        )

    def _cut_row(self) -> "list[Batch]":
        """Cuts the only row at the boundary of examples nearest to its middle."""
        assert self.document_lengths is not None
        lengths = self.document_lengths[0]
        total = sum(lengths)
        counts = range(self.documents_per_example, len(lengths), self.documents_per_example)
        count = min(counts, key=lambda count: abs(2 * sum(lengths[:count]) - total))
        cut = sum(lengths[:count])
        parts = []
        for positions, documents in ((slice(0, cut), lengths[:count]), (slice(cut, total), lengths[count:])):
            targets = self.targets[:, positions]
            num_tokens = max(0, min(self.num_tokens, positions.stop) - positions.start)
            parts.append(
                Batch(
                    input_ids=self.input_ids[:, positions],
                    targets=targets,
                    document_lengths=(documents,),
                    num_tokens=num_tokens,
                    num_trained_tokens=int((targets != IGNORED).sum()),
                    row_tokens=(num_tokens,),
                    documents_per_example=self.documents_per_example,
                )
            )
        return parts


def _even_lengths(width: int, documents: Sequence[int], unit: int) -> tuple[int, ...]:
    """`width` as lengths of as many documents, at most 16 and a multiple of `unit` where there are as many."""
    count = min(len(documents), 16)
    count = max(count // unit * unit, 1)
    return (*(width // count,) * (count - 1), width - width // count * (count - 1))
