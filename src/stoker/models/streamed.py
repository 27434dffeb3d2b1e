"""Weights of a folder streamed into the parts of them that a rank keeps: nobody ever holds the whole model.

A decoder is built on the meta device, quantised layers included, so that all that changes its structure (adapters, the
layer kernel, sharding) works on shapes alone. Then each rank reads, of each tensor, the rows that it keeps. A weight
that is quantised over more than a row (NF4, whose scales are centred over the whole weight) is read whole, one at a
time, and only its part is kept. Embedding and head may have been given more rows than the folder has.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stoker.arch.spec import ArchSpec
from stoker.models import weights
from stoker.models.build import on_meta
from stoker.models.probe import Probe
from stoker.models.quantized import Quantizer, fused_rows
from stoker.models.reader import Reader
from stoker.nn.decoder import Decoder
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.nn.moe import ExpertLinear, FrozenExpertLinear
from stoker.quant.experts import NF4Experts
from stoker.quant.fp8 import Fp8Weight
from stoker.quant.int8 import Int8Weight
from stoker.quant.nf4 import NF4Weight

# Of a weight whose rows are independent, quantised at once: what is made on the way is four bytes a value, twice.
_VALUES_AT_ONCE = 1 << 21

Hold = Callable[[nn.Module, str], tuple[Tensor, int]]
"""From a tensor of a module, by name, to the memory of the rows that this rank keeps and the number of the first."""

Gather = Callable[[Any], list[Any]]
"""Every rank's value, in their order; every rank must call it."""


class StreamedDecoder:
    """A `decoder` on the meta device, and what gives it the weights of `folder`, rows that a rank keeps alone.

    The arguments are those of `native.load`. Which layers fp8 would move too far is found out by all ranks together,
    each on its share of the layers: `rank` of `world_size`, which `gather` hears.
    """

    def __init__(
        self,
        folder: Path | str,
        spec: ArchSpec,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kernels: str = "reference",
        quantization: str = "none",
        rank: int = 0,
        world_size: int = 1,
        gather: Gather = lambda value: [value],
    ) -> None:
        self.decoder: Decoder = on_meta(spec, dtype=dtype, kernels=kernels)
        self._sources = weights.find_sources(self.decoder, spec, folder, ExitStack())
        self._quantizer = Quantizer(quantization, self._reader, device=device, kernels=kernels)
        frozen = weights.to_quantize(self.decoder, self._sources, quantization)
        if quantization == "fp8":
            mine = [name for name in frozen if _block(name) % world_size == rank]
            far = set().union(*gather(self._too_far(spec, mine)))
            frozen = {name: layer for name, layer in frozen.items() if name not in far}
        self._experts = {name for name, layer in frozen.items() if isinstance(layer, ExpertLinear)}
        # Modules, not paths: adapters and the layer kernel put others around them.
        self._stored: dict[str, nn.Module] = {}
        for ours, layer in frozen.items():
            self._stored[ours] = self._freeze(ours, layer, quantization)
        self._plain = {
            ours: (self.decoder.get_submodule(ours.rpartition(".")[0]), ours.rpartition(".")[2])
            for ours in self._sources.names
            if ours not in frozen
        }
        self._layers = {id(module): ours for ours, (module, name) in self._plain.items() if name == "weight"}
        self._reader.let_go()

    @property
    def _reader(self) -> Reader:
        return self._sources.reader

    def fill(self, hold: Hold, filled: Callable[[], None] | None = None) -> None:
        """Reads every weight into the memory that `hold` gives for it, and closes the files.

        All memory that stays is taken first: what is made on the way would leave holes between. With `filled`, which
        is called when the values of a weight are there, memory is taken for one weight at a time.
        """
        held = {} if filled else {ours: self._held(ours, hold) for ours in self._sources.names}
        try:
            block = -1
            for ours, names in self._sources.names.items():
                if block != _block(ours):
                    self._reader.let_go()
                    block = _block(ours)
                self._fill_one(ours, names, held.pop(ours) if ours in held else self._held(ours, hold))
                if filled:
                    filled()
        finally:
            self._reader.let_go()

    def _fill_one(self, ours: str, names: Sequence[str], held: dict[str, tuple[Tensor, int]]) -> None:
        if ours in self._stored:
            self._fill_stored(ours, held)
            return
        module, name = self._plain[ours]
        memory, first = held[name]
        if ours in self._sources.stacked:
            self._fill_experts(names, memory, first, module.get_parameter(name).shape[0])
        else:
            self._fill_rows(names, memory, first)

    def _fill_rows(self, names: Sequence[str], memory: Tensor, first: int) -> None:
        """Reads rows from number `first` on; those of tokens that the folder does not know are the mean of all it has.

        For that mean the tensor is read whole, where some of the new rows are kept.
        """
        num_rows = sum(self._reader.shape(name)[0] for name in names)
        known = min(memory.shape[0], max(0, num_rows - first))
        memory[:known].copy_(fused_rows(self._reader, names, first, first + known))
        if known < memory.shape[0]:
            rows = fused_rows(self._reader, names, 0, num_rows).to(memory.dtype)
            memory[known:].copy_(rows.float().mean(0, keepdim=True).expand_as(memory[known:]))

    def _held(self, ours: str, hold: Hold) -> dict[str, tuple[Tensor, int]]:
        """The memory of a parameter, or of all tensors of its stored form, by their names in their module."""
        if ours not in self._stored:
            module, name = self._plain[ours]
            return {name: hold(module, name)}
        stored = self._stored[ours]
        tensors = {**stored._parameters, **stored._buffers}
        return {name: hold(stored, name) for name, tensor in tensors.items() if tensor is not None}

    def weight_of(self, layer: FusedLinear) -> Tensor:
        """Returns the whole weight of a linear layer that has none yet, as it will be in the layer's products."""
        if isinstance(layer, FrozenLinear):
            ours = next(name for name, module in self._stored.items() if module is layer.matrix)
            stored: Any = self._quantizer.stored(self._sources.names[ours])
            return stored.dequantize(dtype=layer.source_dtype)
        names = self._sources.names[self._layers[id(layer)]]
        weight = fused_rows(self._reader, names, 0, sum(layer.out_features)).to(layer.weight.dtype)
        self._reader.let_go()
        return weight.to(self._quantizer.device)

    def _fill_experts(self, names: Sequence[str], memory: Tensor, first: int, num_experts: int) -> None:
        in_group = len(names) // num_experts
        for index, expert in enumerate(memory, start=first):
            group = names[index * in_group : (index + 1) * in_group]
            expert.copy_(torch.cat([self._reader.dense(name) for name in group]))

    def _too_far(self, spec: ArchSpec, names: Sequence[str]) -> set[str]:
        """Those of the weights `names`, in the model's order, that fp8 would move too far."""
        reader, found = self._reader, self._sources.names
        probe = Probe(spec, lambda norm: reader.dense(found[norm][0]) if norm in found else None)
        far = set()
        for ours in names:
            if isinstance(self._quantizer.matrix(found[ours], layer=ours.removesuffix(".weight"), probe=probe), Tensor):
                far.add(ours)
            reader.let_go()
        return far

    def _freeze(self, ours: str, layer: FusedLinear | ExpertLinear, kind: str) -> nn.Module:
        """Puts a frozen layer without memory in the place of `layer` and returns its stored form."""
        parent, _, name = ours.removesuffix(".weight").rpartition(".")
        stored = self._stored_on_meta(self._sources.names[ours], layer, kind)
        if isinstance(layer, ExpertLinear):
            assert isinstance(stored, NF4Weight)
            frozen: nn.Module = FrozenExpertLinear(layer, NF4Experts(stored, layer.num_experts))
        else:
            frozen = FrozenLinear(layer, stored)
        setattr(self.decoder.get_submodule(parent), name, frozen)
        return stored

    def _stored_on_meta(self, names: Sequence[str], layer: FusedLinear | ExpertLinear, kind: str) -> nn.Module:
        """The stored form of a layer's weight, without memory."""
        if self._reader.packed.issuperset(names):  # its state says how it was quantised
            stored = (
                self._quantizer.experts(names) if isinstance(layer, ExpertLinear) else self._quantizer.stored(names)
            )
            return stored.to("meta")
        shapes = [self._reader.shape(name) for name in names]
        if kind == "nf4":
            is_one = len(shapes[0]) > 2  # one tensor for all experts
            part_rows = (shapes[0][1],) * shapes[0][0] if is_one else tuple(shape[0] for shape in shapes)
            return self._quantizer.on_meta(part_rows, layer.in_features, dtype=self._reader.dtype(names[0]))
        shape = sum(shape[0] for shape in shapes), layer.in_features
        return self._quantizer.rows_on_meta(shape)

    def _fill_stored(self, ours: str, held: dict[str, tuple[Tensor, int]]) -> None:
        names, stored = self._sources.names[ours], self._stored[ours]
        if isinstance(stored, Int8Weight) or (isinstance(stored, Fp8Weight) and "transposed" not in held):
            (memory, first), (scale, _) = held["quantized"], held["scale"]
            step = max(1, _VALUES_AT_ONCE // memory.shape[1])
            for start in range(0, memory.shape[0], step):
                rows = slice(start, min(start + step, memory.shape[0]))
                made: Any = self._quantizer.rows(names, first + rows.start, first + rows.stop)
                memory[rows] = made.quantized
                scale[rows] = made.scale
            return
        whole: Any = self._quantizer.experts(names) if ours in self._experts else self._quantizer.stored(names)
        if isinstance(whole, Fp8Weight):
            whole.set_transposed(kept=True)
        for name, (memory, first) in held.items():
            memory.copy_(getattr(whole, name)[first : first + memory.shape[0]])


def _block(ours: str) -> int:
    """The number of the block that a parameter belongs to; -1 for those outside of blocks."""
    first, _, rest = ours.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else -1
