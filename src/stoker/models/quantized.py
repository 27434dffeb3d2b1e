"""Weights quantised on the way from the disk to the device."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stoker.models.reader import Reader
from stoker.quant import nf4
from stoker.quant.formats import quantize
from stoker.quant.frozen import Scratch


class Quantizer:
    """Makes the stored form `kind` of fused weights that `reader` reads; all share one buffer to be dequantised in."""

    def __init__(self, kind: str, reader: Reader, *, device: torch.device | str, kernels: str) -> None:
        self._kind = kind
        self._reader = reader
        self._device = torch.device(device)
        self._kernels = kernels
        self._scratch = Scratch()

    def matrix(self, names: Sequence[str]) -> nn.Module:
        """Returns the weight of the tensors `names`, one below the other; those in NF4 already are taken as they are.

        A weight is quantised from the values and in the dtype that the folder holds, whatever the compute type.
        """
        if self._reader.packed.issuperset(names):
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= self._reader.packed_tensors(name, device=self._device)
            modules = tuple(name.removesuffix(".weight") for name in names)
            return nf4.from_checkpoint(tensors, modules, scratch=self._scratch, implementation=self._kernels)
        dense, part_rows = self._fused(names)
        made = quantize(dense, self._kind, part_rows=part_rows, scratch=self._scratch, implementation=self._kernels)
        return cast("nn.Module", made)

    def _fused(self, names: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
        """The tensors below one another on the device, read one at a time, and the rows of each."""
        rows = tuple(self._reader.shape(name)[0] for name in names)
        first = self._reader.dense(names[0])
        if len(names) == 1:
            return first.to(self._device), rows
        fused = torch.empty((sum(rows), first.shape[1]), dtype=first.dtype, device=self._device)
        fused[: rows[0]] = first
        del first
        start = rows[0]
        for name, size in zip(names[1:], rows[1:], strict=True):
            fused[start : start + size] = self._reader.dense(name)
            start += size
        return fused, rows
