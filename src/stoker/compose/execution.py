"""Puts the plan's ladder, offload and memory limit into effect on a loaded model."""

import os
from typing import TYPE_CHECKING, Any

from stoker.plan.memory import BASE_BYTES, GIB
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    from stoker.kernels.offload import HostOffload
    from stoker.models.open import Model
    from stoker.nn.linear import FusedLinear

# Layers that a notice names one by one.
_NAMED = 8
HEAD = "the head"


def set_up_layers(decoder: "Model", plan: Plan) -> "HostOffload | None":
    """Lets each layer run and keep what the plan says; returns where kept tensors wait, if they do.

    What an earlier run in this process set is undone first, so that a notebook can train a model again.
    """
    from stoker.adapters.fused_block import FusedBlock, fuse_blocks
    from stoker.adapters.lora import set_kernels
    from stoker.kernels.offload import HostOffload
    from stoker.nn.mamba1 import Mamba1

    take_apart(decoder)
    set_kernels(decoder, plan.kernels)
    ladder, offload = plan.ladder, None
    if ladder.num_away:
        offload = HostOffload(spare_bytes=ladder.staying * (plan.host_bytes // ladder.num_away))
    if plan.layers == "fused":
        fuse_blocks(
            decoder,
            keep=plan.keep,
            implementation=plan.kernels,
            offload=offload,
            tile_tokens=plan.tile_tokens,
            staying=ladder.staying,
        )
    for block, rung in zip(decoder.blocks, plan.keep, strict=True):
        if isinstance(block, FusedBlock):
            continue
        block.recompute = rung in ("attention", "input")  # type: ignore[assignment]
        block.keep_attention = rung == "attention"  # type: ignore[assignment]
        if isinstance(mixer := getattr(block, "mixing", None), Mamba1):
            # The reference would keep the state of every position.
            mixer.keeps_all = rung == "all" and plan.kernels == "triton"
    return offload


def take_apart(decoder: "Model") -> None:
    """Lets every layer run op by op again and keep all, with the same submodules and parameters."""
    from stoker.adapters.fused_block import FusedBlock
    from stoker.nn.block import Block

    for index, block in enumerate(decoder.blocks):
        if isinstance(block, FusedBlock):
            parts: list[Any] = [block.attention, block.feed_forward]
            norms: dict[str, Any] = {name: getattr(block, name) for name in ("attention_norm", "feed_forward_norm")}
            decoder.blocks[index] = Block(*parts, **norms).train(block.training)
        block.recompute = block.keep_attention = False  # type: ignore[assignment]


def set_up_weights(decoder: "Model", plan: Plan) -> None:
    """Keeps the copies for fp8 products that the plan says, and lets go of those of an earlier run that it does not.

    They are transposed weights, and a head in fp8, unless that would move the logits too far.
    """
    from stoker.nn.decoder import Decoder
    from stoker.quant.fp8 import Fp8Weight
    from stoker.quant.fp8_head import in_fp8

    for module in decoder.modules():
        if isinstance(module, Fp8Weight):
            module.set_transposed(kept=plan.keep_transposed is True)
    if isinstance(decoder, Decoder):
        decoder.rounded_head = None  # before another takes memory
        if _asks_for_head(decoder, plan):
            norm = decoder.final_norm
            factor = None if norm.weight is None else norm.weight.float() + norm.offset
            decoder.rounded_head = in_fp8(decoder.head_weight, factor)


def layers_not_in_fp8(decoder: "Model", plan: Plan) -> list[str]:
    """Returns the names of the linear layers that an fp8 base keeps in the compute type; none for others.

    The head is one of them where the plan would have had it in fp8.
    """
    from stoker.nn.frozen_linear import FrozenLinear

    if plan.quantization != "fp8":
        return []
    found = [_short(layer.names) for layer in _linear_layers(decoder) if not isinstance(layer, FrozenLinear)]
    return [*found, HEAD] if _asks_for_head(decoder, plan) and getattr(decoder, "rounded_head", None) is None else found


def _asks_for_head(decoder: "Model", plan: Plan) -> bool:
    """Whether the head is to be in fp8; one that was given rows for new tokens may have no size for it any more."""
    from stoker.quant.fp8_head import can_multiply

    return plan.head_in_fp8 is True and decoder.head_weight is not None and can_multiply(decoder.head_weight)


def _linear_layers(decoder: "Model") -> "list[FusedLinear]":
    from stoker.nn.linear import FusedLinear

    return [module for module in decoder.blocks.modules() if isinstance(module, FusedLinear)]


def fp8_notice(decoder: "Model", plan: Plan) -> str:
    """Returns the sentence that says which layers stay in the compute type, or ""."""
    from stoker.quant.fp8 import MAX_RELATIVE_ERROR

    kept, count = layers_not_in_fp8(decoder, plan), len(_linear_layers(decoder)) + _asks_for_head(decoder, plan)
    if not kept:
        return ""
    more = f", and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
    verb = "stays" if len(kept) == 1 else "stay"
    return (
        f"{len(kept)} of {count} linear layers {verb} in {plan.precision}, because fp8 would move the output by more "
        f"than {MAX_RELATIVE_ERROR:.0%}: {'; '.join(kept[:_NAMED])}{more}."
    )


def borrowed_notices(decoder: "Model", *, packing: bool) -> list[str]:
    """Returns a sentence for each thing that a class of Transformers does otherwise than a native model would."""
    from stoker.models.borrowed.model import BorrowedModel

    if not isinstance(decoder, BorrowedModel):
        return []
    found = [*decoder.notices]
    if packing and decoder.why_not_packed:
        found.append(f"packed rows run document by document, because {decoder.why_not_packed}")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in found]


def _short(names: tuple[str, ...]) -> str:
    """A fused layer's names with their common beginning once: "model.layers.0.mlp.gate_proj, up_proj"."""
    return ", ".join((names[0], *(name.rpartition(".")[2] for name in names[1:])))


def limit_memory(plan: Plan, limit_gib: float | None) -> None:
    """Lets the run take no more of the GPU than the user allows; None lifts a limit set before.

    PyTorch's allocator gets what the plan leaves for it: the limit less the room of the CUDA context.
    """
    import torch

    if plan.device == "cuda":
        _, total = torch.cuda.mem_get_info()
        allowed = total if limit_gib is None else min(total, limit_gib * GIB - BASE_BYTES["cuda"])
        torch.cuda.set_per_process_memory_fraction(max(0.0, allowed / total))


def let_segments_grow() -> None:
    """Lets PyTorch's CUDA allocator enlarge the blocks that it has, unless its settings are the user's own.

    Rows of many lengths otherwise leave blocks of sizes that none fits again. It must be said before a process first
    takes memory of a GPU; later it changes nothing.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def warm_up_reason(plan: Plan) -> str:
    """Returns why a first step may take long, and where what it makes is kept; "" where it makes nothing."""
    if plan.kernels != "triton":
        return ""
    folder = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    return f"Triton compiles each kernel once and keeps it in {folder}, which TRITON_CACHE_DIR moves"
