"""A fused linear layer whose weight is kept in a frozen format."""

from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from stoker.kernels.projection import FrozenMatrix
from stoker.nn.linear import FusedLinear


class FrozenLinear(FusedLinear):
    """A `FusedLinear` whose weight is never trained and is stored as `matrix`: NF4, int8 or fp8 (see the quant room).

    `matrix` is a module with `matmul`, `matmul_transposed` and `dequantize`; names, slices and bias are the layer's.
    `weight` dequantises the whole matrix at every access: for merging and tests, not for training.
    """

    def __init__(self, layer: FusedLinear, matrix: nn.Module) -> None:
        nn.Module.__init__(self)  # FusedLinear's own would make the weight that this layer is there to avoid
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.names = layer.names
        self.by_name_only = layer.by_name_only
        self.source_dtype = layer.weight.dtype
        self.bias = layer.bias
        self.matrix = matrix

    @property
    def weight(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """The dequantised weight `[sum(out_features), in_features]`, a new tensor in the dtype that it had before."""
        return cast("Any", self.matrix).dequantize(dtype=self.source_dtype)

    @property
    def device(self) -> torch.device:
        """Where the stored weight is."""
        return next(chain(self.matrix.buffers(), self.matrix.parameters())).device  # sharded, these are parameters

    def product(self, x: Tensor) -> Tensor:
        """Returns `x @ weight.T`, in autocast's dtype where it is on; gradient of `x`."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            flat = _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), self.matrix)
        return flat.view(*x.shape[:-1], flat.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x @ weight.T + bias`; gradients of `x` and the bias."""
        output = self.product(x)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _FrozenProduct(torch.autograd.Function):
    """Saves neither x nor a dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: FrozenMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.matmul(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.matmul_transposed(grads[0]), None
