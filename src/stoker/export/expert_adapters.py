"""Adapters of experts in PEFT's layout for 3-D parameters (`target_parameters`, its ParamWrapper).

PEFT wraps the module that holds the parameters once for each adapted one, in the order of the parameters: the last is
outermost (`experts.lora_A`), the one before it lies in its `base_layer`. All A lie below one another, `[E r, in]`; B is
`[out, r E]` with the expert as its fastest index. Source: peft 0.21, `tuners/lora/layer.py`.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from stoker.adapters.experts import ExpertLinear, LoraExperts, interleave

_INNER = ".base_layer"


def modules(layers: Iterable[ExpertLinear], adapted: Collection[str]) -> dict[str, str]:
    """Returns PEFT's module of each adapted parameter, by the parameter's name; `layers` are in the model's order."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.name in adapted:
            found.setdefault(layer.name.rpartition(".")[0], []).append(layer.name)
    return {
        name: module + _INNER * (len(names) - 1 - index)
        for module, names in found.items()
        for index, name in enumerate(names)
    }


def target_parameters(adapted: Iterable[str]) -> list[str]:
    """Returns what PEFT calls the parameters: "mlp.experts.down_proj" for that of all layers."""
    return sorted({".".join(name.split(".")[-3:]) for name in adapted})


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether PEFT's `targets` name the parameter."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def shapes(layer: ExpertLinear, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the shapes of PEFT's A and B."""
    size = layer.num_experts * rank
    return (size, layer.in_features), (layer.out_features, size)


def to_peft(layer: LoraExperts) -> tuple[Tensor, Tensor]:
    """Returns PEFT's A and B, in fp32 on the CPU."""
    a, b = layer.lora_a.detach().cpu(), layer.lora_b.detach().cpu()
    if layer.base.is_interleaved:
        b = interleave(b)
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


@torch.no_grad()
def from_peft(layer: LoraExperts, tensors: Mapping[str, Tensor]) -> None:
    """Fills the adapter from PEFT's `tensors` "lora_A" and "lora_B"."""
    a, b = by_expert(layer.base, tensors)
    layer.lora_a.copy_(a)
    layer.lora_b.copy_(b)


def by_expert(layer: ExpertLinear, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns A `[E, rank, in]` and B `[E, out, rank]` of the adapter on `layer` from PEFT's "lora_A" and "lora_B"."""
    a = tensors["lora_A"].view(layer.num_experts, -1, layer.in_features)
    b = tensors["lora_B"].view(layer.out_features, a.shape[1], -1).permute(2, 0, 1)
    return a, torch.cat((b[:, ::2], b[:, 1::2]), dim=1) if layer.is_interleaved else b
