"""Puts the plan's ladder, offload and memory limit into effect on a loaded model."""

from typing import TYPE_CHECKING

from stoker.plan.memory import GIB
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    from stoker.kernels.offload import HostOffload
    from stoker.nn.decoder import Decoder


def set_up_layers(decoder: "Decoder", plan: Plan) -> "HostOffload | None":
    """Lets each layer run and keep what the plan says; returns where kept tensors wait, if they do.

    What an earlier run in this process set is undone first, so that a notebook can train a model again.
    """
    from stoker.adapters.fused_block import fuse_blocks
    from stoker.kernels.offload import HostOffload

    take_apart(decoder)
    offload = HostOffload() if plan.offload_activations else None
    if plan.layers == "fused":
        fuse_blocks(decoder, keep=plan.keep, implementation=plan.kernels, offload=offload)
        return offload
    for block, rung in zip(decoder.blocks, plan.keep, strict=True):
        block.recompute = rung == "input"  # type: ignore[assignment]
    return None


def take_apart(decoder: "Decoder") -> None:
    """Lets every layer run op by op again and keep all, with the same submodules and parameters."""
    from stoker.adapters.fused_block import FusedBlock
    from stoker.nn.block import Block

    for index, block in enumerate(decoder.blocks):
        if isinstance(block, FusedBlock):
            norms = {"attention_norm": block.attention_norm, "feed_forward_norm": block.feed_forward_norm}
            decoder.blocks[index] = Block(block.attention, block.feed_forward, **norms).train(block.training)
        block.recompute = False  # type: ignore[assignment]


def limit_memory(plan: Plan, limit_gib: float | None) -> None:
    """Lets PyTorch's allocator take no more of the GPU than the user allows; None lifts a limit set before."""
    import torch

    if plan.device == "cuda":
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(1.0 if limit_gib is None else min(1.0, limit_gib * GIB / total))
