"""Weights of a mixture's experts in NF4, made dense in a shared buffer for one product at a time."""

import torch
from torch import Tensor, nn

from stoker.quant.frozen import Scratch
from stoker.quant.nf4 import NF4Weight


class NF4Experts(nn.Module):
    """Frozen weights `[E, out, in]` of E experts in NF4, each quantised as if alone.

    `stored` holds them one below the other, `[E out, in]`, in one or more parts an expert. They are dequantised for a
    product into the buffer that all layers share, only those of experts that have rows (with the Triton kernel).
    """

    def __init__(self, stored: NF4Weight, num_experts: int) -> None:
        super().__init__()
        if stored.shape[0] % num_experts:
            raise ValueError(f"{stored.shape[0]} rows are not those of {num_experts} equal experts")
        self.stored = stored
        self.num_experts = num_experts

    @classmethod
    def quantize(
        cls, weight: Tensor, *, parts: int = 1, scratch: Scratch | None = None, implementation: str = "reference"
    ) -> "NF4Experts":
        """Returns `weight` `[E, out, in]` quantised on its own device, each expert's rows in `parts` equal parts."""
        num_experts, rows = weight.shape[:2]
        part_rows = (rows // parts,) * (parts * num_experts)
        stored = NF4Weight.quantize(
            weight.flatten(0, 1), part_rows=part_rows, scratch=scratch, implementation=implementation
        )
        return cls(stored, num_experts)

    @property
    def num_bytes(self) -> int:
        """Bytes that the stored form takes."""
        return self.stored.num_bytes

    def dense(self, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns `[E, out, in]` in `dtype`, valid until the next call; see `kernels.mixture.FrozenExperts`."""
        out = None
        if self.stored.scratch is not None:
            device = self.stored.packed.device
            out = self.stored.scratch.take(self.stored.shape, dtype=dtype, device=device)
        return self._by_expert(self.stored.dequantize(out, dtype=dtype, ends=ends))

    def dequantize(self, *, dtype: torch.dtype) -> Tensor:
        """Returns all of them, a new tensor `[E, out, in]`."""
        return self._by_expert(self.stored.dequantize(dtype=dtype))

    def _by_expert(self, dense: Tensor) -> Tensor:
        return dense.view(self.num_experts, -1, self.stored.shape[1])
