"""What the kernels of recurrences share: step sizes and gates, and tensors that may be missing."""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.kernels.triton_support import jit, tl


@jit
def softplus(value: tl.tensor) -> tl.tensor:
    """Returns log(1 + exp(value)), exact to a few units in the last place for the small step sizes of a state space."""
    exponential = tl.exp(tl.minimum(value, 20.0))
    # The logarithm of the rounded sum, corrected for the rounding; alone it keeps three digits of a step of 1e-4.
    rounded = 1.0 + exponential
    excess = rounded - 1.0
    log = tl.where(excess == 0.0, exponential, tl.log(rounded) * (exponential / tl.where(excess == 0.0, 1.0, excess)))
    return tl.where(value > 20.0, value, log)


@jit
def sigmoid(value: tl.tensor) -> tl.tensor:
    """Returns 1 / (1 + exp(-value))."""
    return 1.0 / (1.0 + tl.exp(-value))


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Returns `x`, or for None a tensor whose pointer a kernel may take but does not read."""
    return like if x is None else x


def sum_of_parts(parts: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns partial sums [programs, ...] added up in a fixed order, so that two runs agree bit for bit."""
    return parts.sum(0).view(shape).to(dtype)
