"""Adapters folded into the weights they adapt."""

import torch
from torch import Tensor, nn

from stoker.adapters.experts import LoraExperts
from stoker.adapters.lora import LoraLinear, replace
from stoker.kernels.dora import row_norms
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
    weight = layer.base.weight
    for part in layer.adapters():
        weight[part.rows] = merged(
            weight[part.rows], part.a, part.b, scaling=layer.settings.scaling, magnitude=part.magnitude
        )


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, *, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """Returns W + s B A `[out, in]` in fp32 or, with DoRA's `magnitude` `[out]`, its rows made as long as that says.

    Rows are independent of one another: any of them with theirs of `b` and `magnitude` give theirs of the result.
    """
    total = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)
    if magnitude is None:
        return total
    return total * (magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]


@torch.no_grad()
def adapted_output(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float, magnitude: Tensor | None = None
) -> Tensor:
    """Returns what a layer with its adapter makes of `x` `[N, in]`, as training computes it, without W + s B A: fp32.

    What `x @ merged(...).T` is held against.
    """
    a, b = a.float(), b.float()
    output = x @ weight.float().T + scaling * ((x @ a.T) @ b.T)
    if magnitude is None:
        return output
    return output * (magnitude.float() / row_norms(weight, a, b, scaling=scaling, slices=[slice(0, b.shape[0])]))
