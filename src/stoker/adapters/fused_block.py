"""Runs a model's layers through the layer kernel, which decides by itself what to keep for the backward."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn

from stoker.adapters.lora import LoraLinear, set_kernels
from stoker.kernels.block import BlockOptions, BlockWeights, block
from stoker.kernels.dropout import draw_seed
from stoker.kernels.offload import HostOffload
from stoker.kernels.projection import FrozenMatrix, Projection
from stoker.nn.attention import Attention
from stoker.nn.block import Block
from stoker.nn.cache import LayerCache
from stoker.nn.feed_forward import GatedFeedForward
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.nn.norm import Norm, RmsNorm
from stoker.nn.rotary import Documents


class Beside(NamedTuple):
    """A layer that keeps its tensors on the device, after layers whose tensors wait on the host.

    `num_bytes` of those that are still leaving have to be gone when it has run. `is_first`: the backward of those
    layers follows its own.
    """

    offload: HostOffload
    num_bytes: int
    is_first: bool

    def runs(self, output: Tensor) -> None:
        """Makes room after the forward that gave `output`, and has the layer before find its tensors in time."""
        self.offload.stay(self.num_bytes)
        if self.is_first:
            offload = self.offload
            output.register_hook(lambda grad: offload.bring())  # as the backward begins


class FusedBlock(Block):
    """A Llama-shaped `Block` with the same submodules under the same names, whose training forward is one operation.

    The layer itself rebuilds what it drops. With a cache, as in decoding, it runs op by op. `beside`: what it keeps
    stays on the device, where layers before it let theirs wait on the host.
    """

    def __init__(self, original: Block, options: BlockOptions, *, beside: Beside | None = None) -> None:
        super().__init__(
            cast("Attention", original.attention),
            cast("nn.Module", original.feed_forward),
            attention_norm=cast("Norm", original.attention_norm),
            feed_forward_norm=cast("Norm", original.feed_forward_norm),
        )
        self.options, self.beside = options, beside

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        document_lengths: Documents | None = None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """The arguments and the result are those of `Block.forward`."""
        if cache is not None or cos is None or sin is None:
            context = {"document_lengths": document_lengths, "cache": cache, "cache_length": cache_length}
            return super().forward(x, cos, sin, **context)
        attention, feed_forward = cast("Attention", self.attention), cast("GatedFeedForward", self.feed_forward)
        weights = BlockWeights(
            cast("RmsNorm", self._norm("attention_norm")).factor,
            cast("RmsNorm", self._norm("feed_forward_norm")).factor,
            _projection(attention.qkv),
            _projection(attention.out),
            _projection(feed_forward.gate_up),
            _projection(feed_forward.down),
            *(None if norm is None else cast("RmsNorm", norm).factor for norm in (attention.q_norm, attention.k_norm)),
        )
        output = block(x, cos, sin, weights=weights, options=self.options, document_lengths=document_lengths)
        if self.beside is not None and output.requires_grad:
            self.beside.runs(output)
        return output


def why_not_fused(model: nn.Module) -> str | None:
    """Returns what keeps every layer of `model` from the layer kernel (None: some can run through it).

    That is the shape of the layers themselves.
    """
    reasons = [_why_not(block) for block in cast("nn.ModuleList", model.blocks)]
    return reasons[0] if reasons and all(reasons) else None


def _why_not(block: nn.Module) -> str | None:
    """Returns what of the layer the kernel cannot run, or None."""
    return None if _is_llama(block) else "layers that are not shaped as Llama's"


def _is_llama(block: nn.Module) -> bool:
    """Whether the layer kernel computes what the block does; `arch.shape` says the same of its spec."""
    if type(block) not in (Block, FusedBlock) or getattr(block, "residual_scale", 1.0) != 1.0:
        return False
    attention, feed_forward = getattr(block, "attention", None), getattr(block, "feed_forward", None)
    if not isinstance(attention, Attention) or not isinstance(feed_forward, GatedFeedForward):
        return False
    norms = [block.attention_norm, block.feed_forward_norm]
    if not all(isinstance(norm, RmsNorm) and norm.weight is not None for norm in norms):
        return False
    plain_scores = attention.softcap is None and attention.sinks is None
    return (attention.only_turns or attention.only_norms_and_turns) and plain_scores and feed_forward.has_kernel


def fuse_blocks(
    model: nn.Module,
    *,
    keep: str | Sequence[str] = "all",
    implementation: str = "triton",
    offload: HostOffload | None = None,
    tile_tokens: int | None = None,
    staying: int = 0,
) -> None:
    """Replaces the layers of `model.blocks` by `FusedBlock`s on this instance; parameters keep their names.

    Layers that the kernel cannot run stay as they are, and are run again as a whole unless they keep "all".
    `keep` is one rung (`stoker.kernels.block.KEEP`) for all layers or one for each; with `offload`, the inputs of all
    layers and what attention keeps wait in pinned host memory for the backward, but for those of the last `staying`
    layers, for which its `spare_bytes` are; `tile_tokens` is that of `BlockOptions`. Raises ValueError when the number
    of rungs differs from that of the layers, for an unknown rung, and where `why_not_fused` gives a reason. Call it
    after adapters are added and weights are quantised.
    """
    blocks = cast("nn.ModuleList", model.blocks)
    rungs = [keep] * len(blocks) if isinstance(keep, str) else list(keep)
    if len(rungs) != len(blocks):
        raise ValueError(f"{len(rungs)} rungs for {len(blocks)} layers")
    if reason := why_not_fused(model):
        raise ValueError(f"the layer kernel cannot run {reason}")
    num_away = max(0, len(blocks) - staying)
    for index, rung in enumerate(rungs):
        original = cast("Block", blocks[index])
        if _why_not(original) is not None:
            original.recompute = rung != "all"
            continue
        attention = cast("Attention", original.attention)
        norms = cast("RmsNorm", original.attention_norm), cast("RmsNorm", original.feed_forward_norm)
        options = BlockOptions(
            attention.num_heads,
            attention.num_kv_heads,
            (norms[0].epsilon, norms[1].epsilon),
            attention.window,
            implementation,
            rung,
            offload if index < num_away else None,
            tile_tokens,
            activation=cast("GatedFeedForward", original.feed_forward).activation,
            interleaved=attention.interleaved,
            scale=attention.scale,
            head_epsilon=0.0 if attention.q_norm is None else cast("RmsNorm", attention.q_norm).epsilon,
            exchange=attention.exchange,
        )
        beside = None
        if offload is not None and index >= num_away:
            beside = Beside(offload, offload.spare_bytes // staying, is_first=index == num_away)
        set_kernels(original, implementation)
        blocks[index] = FusedBlock(original, options, beside=beside)


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
    rate = adapter.settings.dropout if adapter.training else 0.0
    seed = draw_seed() if rate > 0.0 else 0
    scale = None if adapter.magnitude is None else adapter.dora_scale()
    low_rank = (adapter.lora_a, adapter.lora_b, adapter.settings.scaling, slices)
    return Projection(weight, base.bias, *low_rank, rate, seed, scale)
