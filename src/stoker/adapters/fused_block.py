"""Runs a model's layers through the layer kernel, which decides by itself what to keep for the backward."""

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from stoker.adapters.lora import LoraLinear
from stoker.kernels.block import BlockOptions, BlockWeights, block
from stoker.kernels.offload import HostOffload
from stoker.kernels.projection import FrozenMatrix, Projection
from stoker.nn.block import Block
from stoker.nn.cache import LayerCache
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.nn.rotary import Documents


class FusedBlock(nn.Module):
    """A `Block` with the same submodules under the same names, whose training forward is one operation.

    With a cache, as in decoding, the layer runs op by op.
    """

    recompute = False  # the layer itself rebuilds what it drops

    def __init__(self, original: Block, options: BlockOptions) -> None:
        super().__init__()
        self.attention_norm = original.attention_norm
        self.attention = original.attention
        self.feed_forward_norm = original.feed_forward_norm
        self.feed_forward = original.feed_forward
        self.options = options

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        document_lengths: Documents | None = None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """The arguments and the result are those of `Block.forward`."""
        if cache is not None:
            run = cast("Callable[..., Tensor]", Block.forward)
            return run(self, x, cos, sin, document_lengths=document_lengths, cache=cache, cache_length=cache_length)
        weights = BlockWeights(
            self.attention_norm.weight,
            self.feed_forward_norm.weight,
            _projection(self.attention.qkv),
            _projection(self.attention.out),
            _projection(self.feed_forward.gate_up),
            _projection(self.feed_forward.down),
        )
        return block(x, cos, sin, weights=weights, options=self.options, document_lengths=document_lengths)


def why_not_fused(model: nn.Module) -> str | None:
    """Returns what of the model the layer kernel cannot run (None: it can): DoRA or dropout in an adapter."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.settings.dora:
            return "DoRA scales the rows of the sum of weight and update"
        if isinstance(module, LoraLinear) and module.settings.dropout > 0.0:
            return f"adapters with dropout = {module.settings.dropout}"
    return None


def fuse_blocks(
    model: nn.Module,
    *,
    keep: str | Sequence[str] = "all",
    implementation: str = "triton",
    offload: HostOffload | None = None,
    tile_tokens: int | None = None,
) -> None:
    """Replaces the layers of `model.blocks` by `FusedBlock`s on this instance; parameters keep their names.

    `keep` is one rung (`stoker.kernels.block.KEEP`) for all layers or one for each; with `offload`, the inputs of all
    layers and what attention keeps wait in pinned host memory for the backward; `tile_tokens` is that of
    `BlockOptions`. Raises ValueError when the number of rungs differs from that of the layers, for an unknown rung, and
    where `why_not_fused` gives a reason. Call it after adapters are added and weights are quantised.
    """
    blocks = cast("nn.ModuleList", model.blocks)
    rungs = [keep] * len(blocks) if isinstance(keep, str) else list(keep)
    if len(rungs) != len(blocks):
        raise ValueError(f"{len(rungs)} rungs for {len(blocks)} layers")
    if reason := why_not_fused(model):
        raise ValueError(f"the layer kernel cannot run {reason}")
    for index, rung in enumerate(rungs):
        original = cast("Block", blocks[index])
        options = BlockOptions(
            original.attention.num_heads,
            original.attention.num_kv_heads,
            (original.attention_norm.epsilon, original.feed_forward_norm.epsilon),
            original.attention.window,
            implementation,
            rung,
            offload,
            tile_tokens,
        )
        blocks[index] = FusedBlock(original, options)


def freeze_into(model: nn.Module, make: Callable[[Tensor, tuple[int, ...]], nn.Module]) -> int:
    """Replaces the weight of every frozen fused linear layer of `model` by `make(weight, part_rows)`; returns how many.

    `make` is a quantiser of the quant room. Layers go one by one, so that beside the model there is one weight at most.
    Layers whose weight is trained stay as they are.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (
                isinstance(child, FusedLinear)
                and not isinstance(child, FrozenLinear)
                and not child.weight.requires_grad
            ):
                setattr(parent, name, FrozenLinear(child, make(child.weight.detach(), child.out_features)))
                count += 1
    return count


def _projection(layer: nn.Module) -> Projection:
    """What the layer kernel needs of a linear layer, with or without an adapter."""
    adapter = layer if isinstance(layer, LoraLinear) else None
    base = cast("FusedLinear", layer if adapter is None else adapter.base)
    weight = cast("FrozenMatrix", base.matrix) if isinstance(base, FrozenLinear) else base.weight
    if adapter is None:
        return Projection(weight, base.bias)
    slices = tuple(base.slices[part] for part in adapter.parts)
    return Projection(weight, base.bias, adapter.lora_a, adapter.lora_b, adapter.settings.scaling, slices)
