"""Adapters folded into the weights they adapt."""

import torch
from torch import nn

from stoker.adapters.experts import LoraExperts
from stoker.adapters.lora import LoraLinear, replace
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.moe import FrozenExpertLinear


@torch.no_grad()
def merge_into(model: nn.Module) -> int:
    """Adds every adapter of `model` to its base weight and puts the plain layers back; returns how many layers changed.

    W becomes W + s B A, or magnitude / |W + s B A| times that with DoRA, row by row. Sums are in fp32 and rounded once
    to the weight's dtype; the weights change in place and stay frozen. Counted are Hugging Face's layers, and
    of experts the parameters that hold all of them. Raises
    ValueError for a quantised base, which cannot hold the sum: load the base in its full precision.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear | LoraExperts)]
    if any(isinstance(layer.base, FrozenLinear | FrozenExpertLinear) for _, layer in layers):
        raise ValueError("a quantised base cannot hold a merged weight")
    for path, layer in layers:
        if isinstance(layer, LoraExperts):
            _merge_experts(layer)
        else:
            _merge(layer)
        replace(model, path, layer.base)
    return sum(len(layer.parts) if isinstance(layer, LoraLinear) else 1 for _, layer in layers)


def _merge_experts(layer: LoraExperts) -> None:
    for expert, weight in enumerate(layer.base.weight):  # one at a time: a dense update of all would be large
        weight.copy_(weight.float() + layer.delta(expert))


def _merge(layer: LoraLinear) -> None:
    weight, scale = layer.base.weight, None if layer.magnitude is None else layer.dora_scale()
    for part in layer.adapters():
        merged = torch.addmm(weight[part.rows].float(), part.b.float(), part.a.float(), alpha=layer.settings.scaling)
        weight[part.rows] = merged if scale is None else merged * scale[part.rows, None]
