"""What a state-space layer remembers of the positions decoded so far: one size, whatever their number."""

import torch
from torch import Tensor


class StateCache:
    """The last inputs of the convolution, [B, W - 1, C], and the state in fp32; zeros before the first position.

    `state` is [B, E, N] of Mamba-1, [B, H, P, N] of Mamba-2. Layers replace both as positions come.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        window_shape: tuple[int, int],
        state_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = torch.zeros(batch_size, *window_shape, dtype=dtype, device=device)
        self.state: Tensor = torch.zeros(batch_size, *state_shape, dtype=torch.float32, device=device)
