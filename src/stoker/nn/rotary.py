"""Tables of cosines and sines for rotary position embeddings."""

from typing import Any

import torch
from torch import Tensor

from stoker.kernels.documents import Boundaries, positions_in_documents
from stoker.kernels.rope import frequencies

Documents = tuple[tuple[int, ...], ...] | Boundaries
"""For each row the lengths of its documents, or the same as a tensor, which is what a CUDA graph can read anew."""

_BY_LENGTH = ("dynamic", "longrope")


class Rotary:
    """Cosines and sines of one rope; shared by all layers that have the same, so a forward computes them once.

    `scaling`: the settings of the scaling `kind`, as `kernels.rope.frequencies` takes them. Not a module: it holds no
    state that a checkpoint or a cast to half precision should touch.
    """

    def __init__(self, dim: int, *, theta: float, kind: str = "default", **scaling: Any) -> None:
        self.dim = dim
        self.theta = theta
        self.kind = kind
        self.scaling = scaling
        # All that were made, the longest last: a CUDA graph goes on reading the one that it was captured with. Each is
        # twice as long as the one before, so that together they are no more than twice the last.
        self._tables: list[tuple[Tensor, Tensor]] = []

    @property
    def renewed_past(self) -> int | None:
        """The length past which a sequence is turned by other angles from its first position on; None: there is none.

        LongRoPE's models compute the whole sequence again there (Transformers does too); those with dynamic theta keep
        what they have cached.
        """
        return self.scaling["original_max_positions"] if self.kind == "longrope" else None

    def span(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions start to end - 1 of a document of `end` tokens: each [1, T, dim/2], fp32."""
        if self.kind in _BY_LENGTH and end > self.scaling["original_max_positions"]:
            return self._compute(torch.arange(start, end, device=device)[None], end)
        cos, sin = self._grown_table(end, device)
        return cos[:, start:end], sin[:, start:end]

    def packed(self, documents: Documents, num_rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines where positions restart in every document: each [B, T, dim/2], fp32."""
        if self._turns_by_length(documents):
            return self._by_document(documents, num_rows, length, device)
        cos, sin = self._grown_table(length, device)
        positions = positions_in_documents(documents, num_rows, length, device)
        return cos[0][positions], sin[0][positions]

    def _turns_by_length(self, documents: Documents) -> bool:
        """Whether a document may be so long that its length decides the angles of all its positions."""
        if self.kind not in _BY_LENGTH:
            return False
        is_tensor = isinstance(documents, Boundaries)
        longest = documents.longest if is_tensor else max(size for row in documents for size in row)
        return longest > self.scaling["original_max_positions"]

    def _by_document(
        self, documents: Documents, num_rows: int, length: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        rows = documents.lengths(num_rows, length) if isinstance(documents, Boundaries) else documents
        tables = {size: self.span(0, size, device) for row in rows for size in row}
        cos, sin = (
            torch.stack([torch.cat([tables[size][part][0] for size in row]) for row in rows]) for part in (0, 1)
        )
        return cos, sin

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions` [B or 1, T]: each [B or 1, T, dim/2], fp32.

        A row is taken for one document that is as long as its largest position says.
        """
        if self.kind not in _BY_LENGTH:
            return self._compute(positions, 0)
        rows = [self._compute(row[None], int(row.max()) + 1) for row in positions]
        cos, sin = (torch.cat([row[part] for row in rows]) for part in (0, 1))
        return cos, sin

    def _compute(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """positions: [B, T]; `length`: of the document, in tokens."""
        inverse, factor = frequencies(self.dim, self.theta, kind=self.kind, length=length, **self.scaling)
        angles = positions[..., None].float() * inverse.to(positions.device)
        return angles.cos() * factor, angles.sin() * factor

    def _grown_table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables of at least `length` positions, kept for the next call."""
        if not self._tables or self._tables[-1][0].device != device:
            self._tables = []
        if not self._tables or self._tables[-1][0].shape[1] < length:
            size = max(256, 1 << (length - 1).bit_length())
            self._tables.append(self._compute(torch.arange(size, device=device)[None], 0))
        return self._tables[-1]
