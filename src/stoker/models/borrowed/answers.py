"""The tokens that a loaded model is asked about, and when two of its answers are the same."""

import torch
from torch import Tensor

NUM_TOKENS = 12
CUT = 5
"""Where the tokens are cut into two documents, or into what is there and what is decoded."""
# Largest allowed difference as a share of the largest value. fp32: sums in another order. Half precision: two
# implementations of attention round differently in every layer.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)
"""What classes raise for arguments or shapes that they do not know, UnsupportedError among them."""


def probe_ids(vocab_size: int, device: torch.device) -> Tensor:
    """A row [1, NUM_TOKENS] of random tokens, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, NUM_TOKENS), generator=generator).to(device)


def agrees(one: Tensor, other: Tensor) -> bool:
    """Whether two results are equal within the rounding of their dtype."""
    tolerance = max(_TOLERANCES.get(tensor.dtype, 1e-4) for tensor in (one, other))
    one, other = one.float(), other.float()
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())
