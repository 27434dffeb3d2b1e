"""Random inputs for the linear layers of a model, with the channels as unequal as the model itself makes them.

fp8 rounds inputs row by row, so that what it does to a layer depends on how far its input's channels lie apart. A
norm's weight scales the channels of what q, k, v, gate and up read; v's weight makes those of what the output
projection reads, gate's and up's those of what down reads:

    qkv, gate_up: normal · norm.weight        out: v of those        down: silu(gate) · up of those

Outliers that only text brings are not in them.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, PlainSpec
from stoker.nn.feed_forward import ACTIVATIONS

_NUM_INPUTS = 32
_NORMS = {"qkv": "attention_norm", "gate_up": "feed_forward_norm", "up": "feed_forward_norm"}


class Probe:
    """Gives each linear layer its inputs; layers come in the order in which the model computes them.

    `norm_weight` reads a norm's weight by our name of it ("blocks.0.attention_norm.weight"), None if there is none.
    """

    def __init__(self, spec: ArchSpec, norm_weight: Callable[[str], Tensor | None]) -> None:
        self._spec = spec
        self._norm_weight = norm_weight
        self._outputs: Mapping[str, Tensor] = {}

    def inputs(self, layer: str, size: int, *, device: torch.device) -> Tensor:
        """Returns float32 `[32, size]` for the layer of that name ("blocks.0.attention.qkv"), the same in every run."""
        block, part, kind = _named(layer)
        # Parts of parts, as a shared expert is, read what no single tensor of the file tells.
        is_part = re.fullmatch(r"blocks\.\d+", block) is not None and part in ("attention", "feed_forward")
        found = self._from_forerunner(self._spec.layers[int(block[7:])], part, kind) if is_part else None
        if found is not None:
            return found
        generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device sees the same
        normal = torch.randn(_NUM_INPUTS, size, generator=generator).to(device)
        factor = self._norm_factor(block, kind) if is_part and kind in _NORMS else None
        # A layer that reads a latent vector has other channels than the block's norm.
        is_read = factor is not None and factor.numel() == size
        return normal * factor.to(device).float() if is_read else normal

    def _from_forerunner(self, layer: LayerSpec, part: str, kind: str) -> Tensor | None:
        """What the layer that was seen last makes of its output, if the next one reads it."""
        if part == "attention" and kind == "out" and "qkv" in self._outputs:
            return _values(self._outputs["qkv"], layer) if isinstance(layer.mixer, AttentionSpec) else None
        feed_forward = layer.feed_forward
        if kind == "down" and isinstance(feed_forward, GatedSpec) and "gate_up" in self._outputs:
            gate, up = self._outputs["gate_up"].chunk(2, dim=-1)
            return ACTIVATIONS[feed_forward.activation](gate * feed_forward.gate_scale) * up
        if kind == "down" and isinstance(feed_forward, PlainSpec) and "up" in self._outputs:
            return ACTIVATIONS[feed_forward.activation](self._outputs["up"])
        return None

    def _norm_factor(self, block: str, kind: str) -> Tensor | None:
        """What the norm before a layer multiplies by; in a parallel block with one norm, the mixer's for both."""
        layer = self._spec.layers[int(block[7:])]
        name = _NORMS[kind] if _NORMS[kind] in layer.norm_names else f"{layer.mixer_name}_norm"
        weight = self._norm_weight(f"{block}.{name}.weight") if name in layer.norm_names else None
        return None if weight is None else weight.float() + layer.norm.weight_offset

    def saw(self, layer: str, output: Tensor) -> None:
        """Takes the layer's output `[32, out]`, which makes the inputs of the one that follows it in its block."""
        self._outputs = {_named(layer)[2]: output}


def _named(layer: str) -> tuple[str, str, str]:
    """(block, its part, the layer in it)."""
    head, _, kind = layer.rpartition(".")
    block, _, part = head.rpartition(".")
    return block, part, kind


def _values(qkv: Tensor, layer: LayerSpec) -> Tensor:
    """What attention makes of v where each position sees itself alone: v, once for each query head."""
    mixer = layer.mixer
    assert isinstance(mixer, AttentionSpec)
    if mixer.qkv_layout == "grouped":
        values = qkv.view(len(qkv), mixer.num_kv_heads, -1, mixer.head_dim)[:, :, -1]
    else:
        values = qkv[:, -mixer.num_kv_heads * mixer.head_dim :].view(-1, mixer.num_kv_heads, mixer.head_dim)
    return values.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=1).flatten(1)
