"""Which document each position of packed rows belongs to, as a tensor that recurrent kernels read.

A recurrence starts anew wherever the number of the document changes, and an intermediate result may pass from position
s to position t only where the two are the same. Attention needs lengths instead, see `kernels.attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

DocumentLengths = Sequence[Sequence[int]]


def document_ids(
    document_lengths: DocumentLengths | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Returns the number, from 0, of each position's document in its row: [B, T] int32, or None if all are number 0.

    `document_lengths`: for each row the lengths of its documents; None: a row is one document. Raises ValueError for
    lengths that do not sum to T. All layers of a model ask with the same tuple, so the last answers are kept.
    """
    if document_lengths is None:
        return None
    rows = tuple(tuple(row) for row in document_lengths)
    if len(rows) != batch or any(sum(row) != length for row in rows):
        raise ValueError(f"document_lengths must hold {batch} rows that sum to {length}")
    return None if all(len(row) <= 1 for row in rows) else _ids(rows, device)


@lru_cache(maxsize=16)
def _ids(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    # What inference mode makes could not be saved for a backward later.
    with torch.inference_mode(mode=False):
        ids = [torch.arange(len(row), dtype=torch.int32).repeat_interleave(torch.tensor(row)) for row in rows]
        return torch.stack(ids).to(device)


@lru_cache(maxsize=16)
def boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns where documents of these lengths begin and the last one ends: [len(lengths) + 1] int32, on the device.

    Kept, since every layer asks, and a copy from ordinary host memory makes the host wait for all that the GPU still
    has to do.
    """
    with torch.inference_mode(mode=False):
        ends = torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)
        return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends.to(device)


def starts(ids: Tensor) -> Tensor:
    """Returns [B, T] of bool: where another document starts than the one of the position before (never at 0)."""
    first = torch.zeros_like(ids[:, :1], dtype=torch.bool)
    return torch.cat((first, ids[:, 1:] != ids[:, :-1]), dim=1)


def same_as_before(ids: Tensor, chunk: int) -> Tensor:
    """Returns [B, T] of bool: whether a position belongs to the document that its chunk of `chunk` positions began in.

    That is the document of the position before the chunk; the first chunk's is the row's first.
    """
    before = torch.cat((ids[:, :1], ids[:, chunk - 1 : -1 : chunk]), dim=1)
    return ids == before.repeat_interleave(chunk, dim=1)[:, : ids.shape[1]]
