"""Norms as modules."""

import torch
from torch import Tensor, nn

from stoker.kernels.rms_norm import add_rms_norm, rms_norm


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension, of size `size`, with a weight per channel."""

    def __init__(self, size: int, *, epsilon: float, kernels: str = "reference") -> None:
        super().__init__()
        self.epsilon = epsilon
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        return rms_norm(x, self.weight, self.epsilon, implementation=self.kernels)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm(residual + x), residual + x)."""
        return add_rms_norm(x, residual, self.weight, self.epsilon, implementation=self.kernels)

    def extra_repr(self) -> str:
        """Shows size and epsilon."""
        return f"{self.weight.numel()}, epsilon={self.epsilon}"
