"""Activation checkpointing: a block keeps its input only, and backward runs it again."""

from torch import nn


def recompute_blocks(model: nn.Module) -> int:
    """Lets each of `model.blocks` recompute its inside in backward; returns how many blocks that is.

    Sets the blocks' own `recompute`, which the decoder obeys. Gradients stay those of a model that keeps everything,
    with dropout too: the same numbers are drawn again. Evaluation and generation, without gradients, do not change.
    Raises ValueError if the model's blocks cannot be recomputed.
    """
    blocks = list(model.get_submodule("blocks").children())
    for block in blocks:
        if not hasattr(block, "recompute"):
            raise ValueError(f"{type(block).__name__} has no switch to recompute it")
        block.recompute = True  # type: ignore[assignment]
    return len(blocks)
