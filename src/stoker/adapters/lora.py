"""LoRA, rank-stabilised LoRA and DoRA on the fused linear layers of one model instance.

LoRA: Hu et al. 2021, arXiv:2106.09685. Rank-stabilised scaling: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al.
2024, arXiv:2402.09353. Names, defaults and initialisation are PEFT's, so that adapters can be exchanged with it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stoker.adapters.experts import LoraExperts, lora_experts
from stoker.adapters.settings import LoraSettings
from stoker.adapters.targets import ALL_LINEAR, select
from stoker.errors import ModelError
from stoker.kernels.dora import row_norms, scale_columns
from stoker.kernels.lora import lora_linear
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.nn.moe import ExpertLinear


@dataclass(frozen=True)
class LoraSummary:
    """What `add_lora` did: Hugging Face names of the adapted linear layers, and the number of trained parameters."""

    names: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class LoraPart:
    """The adapter of one Hugging Face linear layer: views of the tensors that its group keeps together.

    `rows` are its rows of the fused weight; `a` `[rank, in]`, `b` `[out, rank]`, `magnitude` `[out]` (DoRA) or None.
    """

    name: str
    rows: slice
    a: Tensor
    b: Tensor
    magnitude: Tensor | None


@dataclass(frozen=True)
class Awaited:
    """Of a model whose weights come later: the device that they will be on, and what reads a linear layer's weight.

    Without `weight_of`, the adapters' own values come from a file: DoRA's magnitudes follow from no weight then.
    """

    device: torch.device | str
    weight_of: Callable[[FusedLinear], Tensor] | None = None


class LoraLinear(nn.Module):
    """A frozen `FusedLinear` with trained low-rank updates on some of its parts.

    `lora_a` `[n * rank, in]` and `lora_b` `[sum of adapted out_features, rank]` hold the adapters of the n adapted
    parts one below the other, `magnitude` `[sum of adapted out_features]` DoRA's row lengths; all are fp32.
    With DoRA, dropout acts on the input of the low-rank update only (PEFT also drops it from the magnitude's change).
    `kernels`: "reference" or "triton", of what DoRA does beside products; whoever sets up the model's layers sets it.
    `awaited`: of a base that has no memory yet, where its adapter goes, and its weight, read for DoRA alone.
    """

    def __init__(
        self,
        base: FusedLinear,
        *,
        parts: tuple[int, ...],
        settings: LoraSettings,
        generator: torch.Generator,
        awaited: "Awaited | None" = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.parts = parts
        self.settings = settings
        self.kernels = "reference"
        self._slices = tuple(base.slices[part] for part in parts)
        num_rows = sum(base.out_features[part] for part in parts)
        device = base.device if awaited is None else awaited.device
        # Kaiming's uniform distribution with a = sqrt(5), as PEFT; drawn on the CPU: the same on every device.
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(len(parts) * settings.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(num_rows, settings.rank, device=device))
        self._kept_norms: tuple[tuple[int, ...], Tensor] | None = None
        self.magnitude = None
        if settings.dora and awaited is not None and awaited.weight_of is None:
            self.magnitude = nn.Parameter(torch.zeros(num_rows, device=device))
        elif settings.dora:
            weight = base.weight if awaited is None or awaited.weight_of is None else awaited.weight_of(base)
            self.magnitude = nn.Parameter(self._norms_of(weight))

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the updates: classes of Transformers ask a linear layer for its weight's dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which such classes ask for as well."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> tuple[int, ...]:
        """Sizes of the base's parts, adapted or not: the output's last dimension is their sum."""
        return self.base.out_features

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a forward in training does: where it is run again, it must draw the same."""
        return self.settings.dropout > 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face names of the adapted parts."""
        return tuple(self.base.names[part] for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the base's output with the updates added: `[..., in]` to `[..., sum(base.out_features)]`."""
        dora = self.magnitude is not None
        if isinstance(self.base, FrozenLinear):
            output = self._on_frozen(x, self.base)
        else:
            output = lora_linear(
                x,
                self.base.weight,
                None if dora else self.base.bias,
                self.lora_a,
                self.lora_b,
                scaling=self.settings.scaling,
                slices=self._slices,
                dropout=self.settings.dropout,
                training=self.training,
            )
        if not dora:
            return output
        rows = output.view(-1, output.shape[-1])
        flat = scale_columns(rows, self.dora_scale(), implementation=self.kernels)
        scaled = flat.view_as(output)
        return scaled if self.base.bias is None else scaled + self.base.bias.to(scaled.dtype)

    def _on_frozen(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """The same over a quantised base, whose dequantised weight must not be kept for the backward."""
        output = base.product(x) if self.magnitude is not None else base(x)
        with torch.autocast(x.device.type, enabled=False):
            dropped = nn.functional.dropout(x.to(output.dtype), self.settings.dropout, self.training)
            product = dropped @ self.lora_a.to(output.dtype).T
            return output + self._update(product, output.shape[-1])

    def _update(self, product: Tensor, num_columns: int) -> Tensor:
        """The low-rank update of all columns, zero in parts without an adapter, of x A^T `[..., n * rank]`."""
        sizes = [rows.stop - rows.start for rows in self._slices]
        b_parts = self.lora_b.to(product.dtype).split(sizes)
        pieces, end = [], 0
        for rows, part, b in zip(self._slices, product.split(self.settings.rank, -1), b_parts, strict=True):
            pieces.append(product.new_zeros(*product.shape[:-1], rows.start - end))
            pieces.append(self.settings.scaling * (part @ b.T))
            end = rows.stop
        pieces.append(product.new_zeros(*product.shape[:-1], num_columns - end))
        return torch.cat(pieces, -1)

    def dora_scale(self) -> Tensor:
        """Returns magnitude / norm for every row of the fused weight, fp32, 1 for parts without an adapter."""
        if self.magnitude is None:
            raise ValueError("only DoRA adapters scale rows")
        adapted = self.magnitude / self._row_norms()
        if len(self.parts) == len(self.base.names):
            return adapted
        scale = torch.ones(sum(self.base.out_features), device=adapted.device)
        rows = torch.cat([torch.arange(rows.start, rows.stop, device=adapted.device) for rows in self._slices])
        return scale.index_copy(0, rows, adapted)

    def _row_norms(self) -> Tensor:
        # While decoding, the norms are computed once: for one token they would cost as much as `rank` tokens.
        a, b, base = self.lora_a, self.lora_b, self.base
        decoding = not self.training and not torch.is_grad_enabled()
        stored = id(base.matrix) if isinstance(base, FrozenLinear) else base.weight.data_ptr()
        key = (a._version, b._version, a.data_ptr(), b.data_ptr(), stored)
        if decoding and self._kept_norms is not None and self._kept_norms[0] == key:
            return self._kept_norms[1]
        norms = self._norms_of(base.weight)
        self._kept_norms = (key, norms) if decoding else None
        return norms

    def _norms_of(self, weight: Tensor) -> Tensor:
        options = {"scaling": self.settings.scaling, "slices": self._slices, "implementation": self.kernels}
        return row_norms(weight, self.lora_a, self.lora_b, **options)

    def adapters(self) -> Iterator[LoraPart]:
        """Yields the adapter of each adapted part, as views of this module's parameters."""
        sizes = [rows.stop - rows.start for rows in self._slices]
        magnitudes = [None] * len(sizes) if self.magnitude is None else self.magnitude.split(sizes)
        a_parts, b_parts = self.lora_a.split(self.settings.rank), self.lora_b.split(sizes)
        for name, rows, a, b, magnitude in zip(self.names, self._slices, a_parts, b_parts, magnitudes, strict=True):
            yield LoraPart(name, rows, a, b, magnitude)


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    dora: bool = False,
    seed: int = 0,
    awaited: Awaited | None = None,
) -> LoraSummary:
    """Replaces the targeted fused linear layers of `model` by `LoraLinear` and freezes every other parameter.

    Those of experts become `LoraExperts`; routers have no adapters.
    `targets` is "all-linear" (every linear layer of the blocks but those that are `by_name_only`: the output
    projections of state spaces), "all-dense" (the same without experts), a list of names, each a whole Hugging Face
    module name or its last components ("q_proj", "self_attn.q_proj"), or a regular expression that matches whole names.
    The initial A depends on `seed` and the targets alone. `awaited`: of a model on the meta device.
    Raises ModelError when a target names nothing, saying what there is, and ValueError when `model` has adapters
    already, or a rank, dropout or seed makes no sense.
    """
    settings = LoraSettings(rank, alpha, dropout, rank_stabilized, dora)
    if next(lora_layers(model), None) is not None or next(lora_experts(model), None) is not None:
        raise ValueError("the model has adapters already: merge them first")
    layers = [
        (path, module) for path, module in model.named_modules() if isinstance(module, FusedLinear | ExpertLinear)
    ]
    experts = [name for _, layer in layers if isinstance(layer, ExpertLinear) for name in _names(layer)]
    chosen = select(
        [name for _, layer in layers for name in _names(layer)],
        targets,
        by_name_only={name for _, layer in layers if getattr(layer, "by_name_only", False) for name in _names(layer)},
        experts=frozenset(experts),
    )
    _refuse_on_experts(settings, experts, chosen)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for path, layer in layers:
        if isinstance(layer, ExpertLinear):
            if layer.name in chosen:
                device = layer.device if awaited is None else awaited.device
                adapted_experts = LoraExperts(layer, settings=settings, generator=generator, device=device)
                replace(model, path, adapted_experts.train(layer.training))
            continue
        parts = tuple(index for index, name in enumerate(layer.names) if name in chosen)
        if parts:
            adapted = LoraLinear(layer, parts=parts, settings=settings, generator=generator, awaited=awaited)
            replace(model, path, adapted.train(layer.training))
    names = tuple(name for layer in lora_layers(model) for name in layer.names)
    names += tuple(layer.name for layer in lora_experts(model))
    return LoraSummary(names, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))


def _names(layer: FusedLinear | ExpertLinear) -> tuple[str, ...]:
    return (layer.name,) if isinstance(layer, ExpertLinear) else layer.names


def _refuse_on_experts(settings: LoraSettings, experts: Sequence[str], chosen: Collection[str]) -> None:
    """Adapters on experts have neither dropout nor DoRA, in PEFT neither: nothing could load them."""
    adapted = [name for name in experts if name in chosen]
    if adapted and (settings.dora or settings.dropout > 0.0):
        what = "DoRA" if settings.dora else f"dropout = {settings.dropout}"
        raise ModelError(
            f"an adapter on experts has no {what} ({adapted[0]} and {len(adapted) - 1} more are targets).",
            fix="Use plain LoRA without dropout, or name targets outside of the experts.",
        )


def lora_layers(model: nn.Module) -> Iterator[LoraLinear]:
    """Yields the model's `LoraLinear` layers, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, LoraLinear))


def set_kernels(model: nn.Module, kernels: str) -> None:
    """Lets DoRA's part of every `LoraLinear` of `model` run in "triton" or as the "reference"."""
    for layer in lora_layers(model):
        layer.kernels = kernels


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the weight shape `(out, in)` of each Hugging Face linear layer that can have an adapter, by its name.

    Of experts: the shape of one of them, by the name of the parameter that holds them all.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for layer in model.modules():
        if isinstance(layer, ExpertLinear):
            shapes[layer.name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, FusedLinear):
            shapes |= {
                name: (size, layer.in_features) for name, size in zip(layer.names, layer.out_features, strict=True)
            }
    return shapes


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule at `path`, on this instance of the model alone."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
