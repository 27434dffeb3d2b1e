"""The tensors of a native model with an adapter folded in, one at a time.

Each comes from the base's files (dequantised where they are packed), gets the adapter's update in fp32 if it has one,
and is rounded once. A matrix is worked on some rows at a time: beyond what is read and what is made of it, memory holds
16 MiB of it in fp32.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from stoker.adapters.experts import expert_layers
from stoker.adapters.merge import adapted_output, merged
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError, StokerError
from stoker.export import adapter, expert_adapters
from stoker.models.build import on_meta
from stoker.models.on_demand import VALUES_AT_ONCE
from stoker.models.parts import Part, parts
from stoker.models.weights import find_sources

# Largest difference, as a share of a layer's largest output, between the two ways of computing it in fp32.
LAYER_TOLERANCE = 1e-4
_NUM_INPUTS = 4
_WRITTEN = (torch.float32, torch.bfloat16, torch.float16)


class MergedTensors:
    """The model of `spec` in `base` with the adapter in `adapter_folder`; its files stay open as long as `stack`.

    `dtype`: of all tensors but those that are kept in fp32; None: each has that of the base's. Raises ModelError when
    base or adapter cannot be used.
    """

    def __init__(
        self, base: Path, spec: ArchSpec, adapter_folder: Path, stack: ExitStack, *, dtype: torch.dtype | None = None
    ) -> None:
        decoder = on_meta(spec, dtype=dtype or torch.float32, kernels="reference")
        self._adapter = adapter.open_stored(decoder, adapter_folder)
        self._sources = find_sources(decoder, spec, base, stack)
        self._reader = self._sources.reader
        self._experts = {layer.name: layer for layer in expert_layers(decoder)}
        self._parts = {part.name: part for part in parts(decoder, spec)}
        self._dtypes = {
            part.name: part.like.dtype if dtype else self._reader.dtype(self._source(part))
            for part in self._parts.values()
        }
        self._kept: tuple[str, tuple[Tensor, Tensor]] | None = None
        strange = sorted({_name(one) for one in self._dtypes.values() if one not in _WRITTEN})
        if strange:
            raise ModelError(
                f"it holds weights in {', '.join(strange)}.", where=str(base), fix="Name a base in bf16 or fp32."
            )
        self._reader.let_go()

    @property
    def num_layers(self) -> int:
        """How many of Hugging Face's linear layers change; all experts of a layer count as one."""
        return len(self._adapter.names)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Those of the tensors."""
        return set(self._dtypes.values())

    def shapes(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name of each tensor with one on the meta device that has its shape and dtype."""
        for name, part in self._parts.items():
            yield name, torch.empty(part.like.shape, dtype=self._dtypes[name], device="meta")

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Returns a tensor as files hold it.

        Raises StokerError when a layer with the merged weight does not compute what it does with the adapter.
        """
        self._reader.let_go()
        part = self._parts[name]
        target = part.entry.parameter or part.entry.theirs[part.index].removesuffix(".weight")
        if target not in self._adapter.names or part.entry.ours.endswith(".bias"):
            values = self._reader.dense(self._source(part)).to(self._dtypes[name])
        elif target in self._experts:
            values = self._merged_experts(part, target)
        else:
            low = self._adapter.read(target)
            factors = low["lora_A"], low["lora_B"], low.get("lora_magnitude_vector")
            values = self._merged_matrix(part, factors)
        return part.as_stored(values)

    def _source(self, part: Part) -> str:
        return self._sources.names[part.entry.ours][part.index]

    def _merged_matrix(self, part: Part, factors: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        source = self._source(part)
        shape = self._reader.shape(source)
        whole = self._reader.dense(source) if source in self._reader.packed else None
        made = torch.empty(shape, dtype=self._dtypes[part.name])
        check = _Check(part.name, shape[-1])
        step = max(1, VALUES_AT_ONCE // shape[-1])
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            weight = self._reader.rows(source, rows.start, rows.stop) if whole is None else whole[rows]
            made[rows] = self._sum(weight, factors, rows, check)
        check.conclude()
        return made

    def _merged_experts(self, part: Part, target: str) -> Tensor:
        """One expert's rows or, where one tensor holds all of them, each in turn."""
        source, (a, b) = self._source(part), self._low_rank(target)
        check = _Check(part.name, a.shape[-1])
        if part.expert is not None:
            made = self._sum(self._reader.dense(source), (a[part.expert], b[part.expert], None), part.rows, check)
            made = made.to(self._dtypes[part.name])
        else:
            made = torch.empty(self._reader.shape(source), dtype=self._dtypes[part.name])
            for expert in range(made.shape[0]):
                weight = self._reader.rows(source, expert, expert + 1)[0]
                made[expert] = self._sum(weight, (a[expert], b[expert], None), slice(None), check)
        check.conclude()
        return made

    def _low_rank(self, target: str) -> tuple[Tensor, Tensor]:
        """The factors of all experts of a layer, kept for the next of its tensors."""
        if self._kept is None or self._kept[0] != target:
            self._kept = target, expert_adapters.by_expert(self._experts[target], self._adapter.read(target))
        return self._kept[1]

    def _sum(
        self, weight: Tensor, factors: tuple[Tensor, Tensor, Tensor | None], rows: slice, check: "_Check"
    ) -> Tensor:
        """The merged `rows` of a matrix in fp32, from those of the base."""
        a, b, magnitude = factors
        options = {
            "scaling": self._adapter.settings.scaling,
            "magnitude": None if magnitude is None else magnitude[rows],
        }
        total = merged(weight, a, b[rows], **options)  # type: ignore[arg-type]
        check.add(total, adapted_output(check.inputs, weight, a, b[rows], **options))  # type: ignore[arg-type]
        return total


class _Check:
    """Holds outputs of a merged layer, of a few random inputs, against those with the adapter beside the base."""

    def __init__(self, name: str, in_features: int) -> None:
        self._name = name
        self.inputs = torch.randn(_NUM_INPUTS, in_features, generator=torch.Generator().manual_seed(0))
        self._largest = self._difference = torch.zeros(())

    def add(self, total: Tensor, expected: Tensor) -> None:
        """Takes note of some rows."""
        # As tensors: a NaN stays one.
        self._largest = torch.maximum(self._largest, expected.abs().max())
        self._difference = torch.maximum(self._difference, (self.inputs @ total.T - expected).abs().max())

    def conclude(self) -> None:
        """Raises StokerError where they differ by more than fp32 does."""
        if not self._difference <= LAYER_TOLERANCE * self._largest:  # a NaN is not within it either
            raise StokerError(
                f"merging changed the answers: outputs of up to {self._largest:.4g} differ by {self._difference:.4g}. "
                "The merged model was not kept.",
                where=self._name,
                fix="Check that the adapter's values are finite.",
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
