"""Norms as modules."""

import torch
from torch import Tensor, nn

from stoker.kernels.layer_norm import add_layer_norm, layer_norm, takes
from stoker.kernels.rms_norm import add_rms_norm, rms_norm


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension, of size `size`.

    It is multiplied by the stored weight of each channel plus `offset`, or by nothing without `weight`.
    """

    def __init__(
        self, size: int, *, epsilon: float, weight: bool = True, offset: float = 0.0, kernels: str = "reference"
    ) -> None:
        super().__init__()
        self.size = size
        self.epsilon = epsilon
        self.offset = offset
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(size)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        if self.weight is None:
            return nn.functional.rms_norm(x.float(), (self.size,), None, self.epsilon).to(x.dtype)
        return rms_norm(x, self.factor, self.epsilon, implementation=self.kernels)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm(residual + x), residual + x)."""
        if self.weight is None:
            total = residual + x
            return self(total), total
        return add_rms_norm(x, residual, self.factor, self.epsilon, implementation=self.kernels)

    @property
    def factor(self) -> Tensor:
        """[size], what the normed values are multiplied by; ValueError without a weight."""
        if self.weight is None:
            raise ValueError("this norm multiplies by nothing")
        # fp32, so that one plus a small weight is not rounded away; the kernels multiply in fp32 anyway.
        return self.weight if self.offset == 0.0 else self.weight.float() + self.offset

    def reset_parameters(self) -> None:
        """Makes the norm multiply by one."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def extra_repr(self) -> str:
        """Shows size and epsilon."""
        return f"{self.size}, epsilon={self.epsilon}"


class LayerNorm(nn.Module):
    """Norm of mean and deviation over the last dimension (arXiv:1607.06450), of size `size`.

    Multiplied by the stored weight plus `offset` (not without `weight`); `bias` is added. Computed in fp32.
    """

    def __init__(
        self,
        size: int,
        *,
        epsilon: float,
        weight: bool = True,
        bias: bool = True,
        offset: float = 0.0,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.size = size
        self.epsilon = epsilon
        self.offset = offset
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        if self.weight is not None and takes(x, self.kernels):
            return layer_norm(x, self._factor(self.weight), self.bias, self.epsilon, implementation=self.kernels)
        weight = self.weight
        if weight is not None:
            weight = (weight if self.offset == 0.0 else weight.float() + self.offset).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # Under autocast it would come out in fp32; its sums are fp32 in every dtype.
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.layer_norm(x, (self.size,), weight, bias, self.epsilon)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm(residual + x), residual + x)."""
        if self.weight is not None and takes(x, self.kernels):
            factor, options = self._factor(self.weight), {"implementation": self.kernels}
            return add_layer_norm(x, residual, factor, self.bias, self.epsilon, **options)
        total = residual + x
        return self(total), total

    def _factor(self, weight: Tensor) -> Tensor:
        return weight if self.offset == 0.0 else weight.float() + self.offset

    def reset_parameters(self) -> None:
        """Makes the norm multiply by one and add nothing."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Shows size and epsilon."""
        return f"{self.size}, epsilon={self.epsilon}"


class HeadNorm(nn.Module):
    """A norm of each head's channels with a weight [H, E] of its own for each head: "rms" or "layer"."""

    def __init__(self, num_heads: int, head_dim: int, *, kind: str, epsilon: float) -> None:
        super().__init__()
        self.kind = kind
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, E] to the same shape and dtype."""
        normed = nn.functional.layer_norm if self.kind == "layer" else nn.functional.rms_norm
        return (normed(x.float(), x.shape[-1:], eps=self.epsilon) * self.weight.float()).to(x.dtype)

    def reset_parameters(self) -> None:
        """Makes the norm multiply by one."""
        nn.init.ones_(self.weight)


Norm = RmsNorm | LayerNorm
"""A norm over the hidden size."""
