"""The short convolution over time in front of a state space, as a module."""

import torch
from torch import Tensor, nn

from stoker.kernels.causal_conv import causal_conv, causal_conv_cached
from stoker.nn.rotary import Documents
from stoker.nn.state_cache import StateCache


class CausalConv(nn.Module):
    """A convolution over the last `kernel_size` positions of each of `channels`, through SiLU.

    `weight` has the shape of a depthwise `Conv1d`'s: [channels, 1, kernel_size].
    """

    def __init__(self, channels: int, kernel_size: int, *, bias: bool = True, kernels: str = "reference") -> None:
        super().__init__()
        self.kernels = kernels
        self.window_shape = (kernel_size - 1, channels)
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self, x: Tensor, *, document_lengths: Documents | None = None, cache: StateCache | None = None
    ) -> Tensor:
        """x [B, T, C] to the same shape, within documents; with a cache x follows its window, which is moved on."""
        weight = self.weight.squeeze(1)
        if cache is None:
            return causal_conv(x, weight, self.bias, document_lengths=document_lengths, implementation=self.kernels)
        out, cache.window = causal_conv_cached(x, cache.window, weight, self.bias)
        return out

    def extra_repr(self) -> str:
        """Shows channels and kernel size."""
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[2]}, bias={self.bias is not None}"
