"""int8 weights with one scale for each output row: half the bytes of bf16, dequantised before each product."""

import torch
from torch import Tensor

from stoker.quant.frozen import DequantizedProducts, Scratch

INT8_MAX = 127.0


class Int8Weight(DequantizedProducts):
    """A frozen weight W = diag(scale) Q `[out, in]`, Q int8 in [-127, 127], `scale = max |row| / 127`, float32."""

    quantized: Tensor
    scale: Tensor

    def __init__(self, quantized: Tensor, scale: Tensor, *, scratch: Scratch | None = None) -> None:
        super().__init__()
        self.shape = quantized.shape
        self.scratch = scratch
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)

    @classmethod
    def quantize(cls, weight: Tensor, *, scratch: Scratch | None = None) -> "Int8Weight":
        """Returns `weight` `[out, in]` rounded to the nearest of 255 levels a row, on its own device."""
        values = weight.detach().float()
        scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / INT8_MAX
        return cls((values / scale).round_().to(torch.int8), scale, scratch=scratch)

    def dequantize(self, out: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
        """Returns the weight in `dtype` `[out, in]`, in `out` when given; one pass, rounded once from float32."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.quantized.device)
        return torch.mul(self.quantized, self.scale, out=out)
