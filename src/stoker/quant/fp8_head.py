"""Whether a head may be in fp8."""

import torch
from torch import Tensor

from stoker.kernels.fp8 import quantize_rows
from stoker.kernels.rounded_head import RoundedHead, round_head
from stoker.quant.fp8 import MAX_RELATIVE_ERROR

_NUM_INPUTS = 32


def can_multiply(weight: Tensor) -> bool:
    """Whether products in fp8 take a head's `weight` `[V, D]`: sizes that 16 divides."""
    return all(size % 16 == 0 for size in weight.shape)


def in_fp8(weight: Tensor, factor: Tensor | None) -> RoundedHead | None:
    """Returns a head's `weight` `[V, D]` in fp8, or None where that would move its logits too far.

    The bound is that of other layers (`quant.fp8`), on hidden states whose channels are as unequal as the final norm
    makes them: normal, times the `factor` `[D]` that the norm multiplies by.
    """
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device sees the same
    inputs = torch.randn(_NUM_INPUTS, weight.shape[1], generator=generator).to(weight.device)
    if factor is not None:
        inputs = inputs * factor.detach().float()
    head = round_head(weight)
    error = relative_error(head, weight, inputs)
    return head if error <= MAX_RELATIVE_ERROR else None


def relative_error(head: RoundedHead, weight: Tensor, inputs: Tensor) -> float:
    """Returns the norm of what moves the logits of `inputs` `[N, D]`, as a share of theirs; NaN where one is not
    finite."""
    rows = quantize_rows(inputs)
    made = head.logits(rows.values).float() * (rows.scale * head.scale)
    moved = total = 0.0
    for columns, piece in zip(made.split(4096, dim=1), weight.split(4096), strict=True):
        expected = inputs @ piece.float().T  # in pieces: a whole head in fp32 would be the largest thing in memory
        moved += (columns - expected).square().sum().item()
        total += expected.square().sum().item()
    return (moved / max(total, 1e-30)) ** 0.5
