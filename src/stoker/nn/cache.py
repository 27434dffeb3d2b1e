"""Keys and values of the positions decoded so far."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, [B, capacity, K, E] each; written in place."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, T, K, E] at `start`; returns views of all keys and values up to their end."""
        end = start + k.shape[1]
        self.keys[:, start:end] = k
        self.values[:, start:end] = v
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """Keys and values of all layers, preallocated for `capacity` positions; `length` of them are filled.

    Layers with a sliding window keep all keys too, so that one length serves all. `Decoder.new_cache` makes one.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shapes`: number of key/value heads and channels per head of each layer."""
        self.capacity = capacity
        self.length = 0
        self.layers = [
            LayerCache(*(torch.zeros(batch_size, capacity, *shape, dtype=dtype, device=device) for _ in range(2)))
            for shape in shapes
        ]

    def require(self, num_tokens: int) -> None:
        """Raises ValueError when `num_tokens` more do not fit."""
        if self.length + num_tokens > self.capacity:
            raise ValueError(f"cache holds {self.length} of {self.capacity} positions; {num_tokens} more do not fit")

    def advance(self, num_tokens: int) -> None:
        """Counts `num_tokens` as filled, once all layers have written them."""
        self.length += num_tokens
