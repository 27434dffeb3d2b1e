"""Weights quantised on the way from the disk to the device."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stoker.models.probe import Probe
from stoker.models.reader import Reader
from stoker.quant import nf4
from stoker.quant.formats import quantize
from stoker.quant.fp8 import MAX_RELATIVE_ERROR, Fp8Weight, exact_product, product_error
from stoker.quant.frozen import Scratch
from stoker.quant.int8 import Int8Weight


class Quantizer:
    """Makes the stored form `kind` of fused weights that `reader` reads; all share one buffer to be dequantised in."""

    def __init__(self, kind: str, reader: Reader, *, device: torch.device | str, kernels: str) -> None:
        self._kind = kind
        self._reader = reader
        self.device = torch.device(device)
        self._kernels = kernels
        self._scratch = Scratch()

    def matrix(self, names: Sequence[str], *, layer: str, probe: Probe) -> nn.Module | Tensor:
        """Returns the weight of the tensors `names`, one below the other; those in NF4 already are taken as they are.

        A weight is quantised from the values and in the dtype that the folder holds, whatever the compute type. One
        that fp8 would move too far (`layer` names it, `probe` gives its inputs) comes back as it is: a tensor.
        """
        stored = self._parts(names)
        if stored is not None:
            return stored
        dense, part_rows = self._fused(names)
        made = self._made(dense, part_rows)
        if isinstance(made, Fp8Weight) and not self._holds(made, dense, part_rows, layer=layer, probe=probe):
            return dense
        return made

    def stored(self, names: Sequence[str]) -> nn.Module:
        """Returns the weight in the format, whatever it does to the layer's output."""
        stored = self._parts(names)
        if stored is not None:
            return stored
        return self._made(*self._fused(names))

    def rows(self, names: Sequence[str], start: int, stop: int) -> nn.Module:
        """Returns rows `start` to `stop - 1` of the weight in a format whose rows are independent (int8, fp8)."""
        return self._made(fused_rows(self._reader, names, start, stop).to(self.device), None)

    def on_meta(self, part_rows: tuple[int, ...], in_features: int, *, dtype: torch.dtype) -> nf4.NF4Weight:
        """Returns a weight in NF4, of such parts and from values of `dtype`, without memory."""
        options: dict[str, Any] = {"scratch": self._scratch, "implementation": self._kernels}
        return nf4.NF4Weight.on_meta(part_rows, in_features, source_dtype=dtype, **options)

    def rows_on_meta(self, shape: tuple[int, int]) -> Int8Weight | Fp8Weight:
        """Returns a weight in int8 or fp8 without memory."""
        scale = torch.empty((shape[0], 1), device="meta")
        if self._kind == "int8":
            return Int8Weight(torch.empty(shape, dtype=torch.int8, device="meta"), scale, scratch=self._scratch)
        quantized = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        return Fp8Weight(quantized, scale, scratch=self._scratch, implementation=self._kernels)

    def _made(self, dense: Tensor, part_rows: tuple[int, ...] | None) -> nn.Module:
        options: dict[str, Any] = {"scratch": self._scratch, "implementation": self._kernels}
        return cast("nn.Module", quantize(dense, self._kind, part_rows=part_rows, **options))

    def experts(self, names: Sequence[str]) -> nf4.NF4Weight:
        """Returns all experts' weights one below the other in NF4, from a tensor for each part or one for all."""
        if len(names) > 1:
            return self._parts(names) or self._quantized(*self._fused(names))
        dense = self._reader.dense(names[0]).to(self.device)
        return self._quantized(dense.flatten(0, 1), (dense.shape[1],) * dense.shape[0])

    def _quantized(self, dense: Tensor, part_rows: tuple[int, ...]) -> nf4.NF4Weight:
        return nf4.NF4Weight.quantize(dense, part_rows=part_rows, scratch=self._scratch, implementation=self._kernels)

    def _parts(self, names: Sequence[str]) -> nf4.NF4Weight | None:
        """The weights of `names` that are stored in NF4 already, as one; None where they are not."""
        if not self._reader.packed.issuperset(names):
            return None
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= self._reader.packed_tensors(name, device=self.device)
        modules = tuple(name.removesuffix(".weight") for name in names)
        return nf4.from_checkpoint(tensors, modules, scratch=self._scratch, implementation=self._kernels)

    @staticmethod
    def _holds(made: Fp8Weight, dense: Tensor, part_rows: tuple[int, ...], *, layer: str, probe: Probe) -> bool:
        """Whether the layer's output stays within the bound on inputs like its own."""
        inputs = probe.inputs(layer, dense.shape[1], device=dense.device)
        expected = exact_product(inputs, dense)
        probe.saw(layer, expected)
        return product_error(made, inputs, expected, part_rows) <= MAX_RELATIVE_ERROR

    def _fused(self, names: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
        """The tensors below one another on the device, read one at a time, and the rows of each."""
        rows = tuple(self._reader.shape(name)[0] for name in names)
        first = self._reader.dense(names[0])
        if len(names) == 1:
            return first.to(self.device), rows
        fused = torch.empty((sum(rows), first.shape[1]), dtype=first.dtype, device=self.device)
        fused[: rows[0]] = first
        del first
        start = rows[0]
        for name, size in zip(names[1:], rows[1:], strict=True):
            fused[start : start + size] = self._reader.dense(name)
            start += size
        return fused, rows


def fused_rows(reader: Reader, names: Sequence[str], start: int, stop: int) -> Tensor:
    """Returns rows `start` to `stop - 1` of the tensors `names` below one another, of which no others are read."""
    pieces, first = [], 0
    for name in names:
        size = reader.shape(name)[0]
        low, high = max(start - first, 0), min(stop - first, size)
        if low < high:
            pieces.append(reader.rows(name, low, high))
        first += size
    if not pieces:  # more ranks than rows
        return reader.rows(names[0], 0, 0)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
