"""What the positions decoded so far have left behind: keys and values, or the states of other mixers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, [B, capacity, K, E] each; written in place."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def empty(cls, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> "LayerCache":
        """A cache of keys and values of one shape, [B, capacity, K, E]."""
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, T, K, E] at `start`; returns views of all keys and values up to their end."""
        end = start + k.shape[1]
        self.keys[:, start:end] = k
        self.values[:, start:end] = v
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """The caches of all layers, preallocated for `capacity` positions; `length` of them are filled.

    `layers` holds what each layer's mixer made (`new_cache`), None for a layer without a mixer. Layers with a sliding
    window keep all keys too, so that one length serves all. `Decoder.new_cache` makes one.
    """

    def __init__(self, layers: Sequence[Any], *, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers = list(layers)

    def require(self, num_tokens: int) -> None:
        """Raises ValueError when `num_tokens` more do not fit."""
        if self.length + num_tokens > self.capacity:
            raise ValueError(f"cache holds {self.length} of {self.capacity} positions; {num_tokens} more do not fit")

    def advance(self, num_tokens: int) -> None:
        """Counts `num_tokens` as filled, once all layers have written them."""
        self.length += num_tokens
