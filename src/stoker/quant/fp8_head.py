"""Whether a head may be in fp8."""

import torch
from torch import Tensor

from stoker.kernels.fp8 import quantize_rows, takes_sizes
from stoker.kernels.rounded_head import RoundedHead, round_head
from stoker.quant.fp8 import MAX_RELATIVE_ERROR, exact_product, worst_error

_NUM_INPUTS = 32


def can_multiply(weight: Tensor) -> bool:
    """Whether products in fp8 take a head's `weight` `[V, D]`, whichever of the two they sum over."""
    return takes_sizes(*weight.shape)


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
    return worst_error(made, exact_product(inputs, weight), (weight.shape[0],))
