"""Adapters folded into the weights they adapt."""

import torch
from torch import nn

from stoker.adapters.lora import LoraLinear, replace
from stoker.nn.frozen_linear import FrozenLinear


@torch.no_grad()
def merge_into(model: nn.Module) -> int:
    """Adds every adapter of `model` to its base weight and puts the plain layers back; returns how many layers changed.

    W becomes W + s B A, or magnitude / |W + s B A| times that with DoRA, row by row. Sums are in fp32 and rounded once
    to the weight's dtype; the weights change in place and stay frozen. Counted are Hugging Face's layers. Raises
    ValueError for a quantised base, which cannot hold the sum: load the base in its full precision.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear)]
    if any(isinstance(layer.base, FrozenLinear) for _, layer in layers):
        raise ValueError("a quantised base cannot hold a merged weight")
    for path, layer in layers:
        _merge(layer)
        replace(model, path, layer.base)
    return sum(len(layer.parts) for _, layer in layers)


def _merge(layer: LoraLinear) -> None:
    weight, scale = layer.base.weight, None if layer.magnitude is None else layer.dora_scale()
    for part in layer.adapters():
        merged = torch.addmm(weight[part.rows].float(), part.b.float(), part.a.float(), alpha=layer.settings.scaling)
        weight[part.rows] = merged if scale is None else merged * scale[part.rows, None]
