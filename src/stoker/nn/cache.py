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
    window keep all keys too, so that one length serves all. `Decoder.new_cache` makes one. `renewed_past`: a sequence
    longer than so many tokens is turned otherwise from its first position on, so that what is cached no longer holds.
    """

    def __init__(self, layers: Sequence[Any], *, capacity: int, renewed_past: int | None = None) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers = list(layers)
        self.renewed_past = renewed_past
        self._ids: list[Tensor] = []

    def require(self, num_tokens: int) -> None:
        """Raises ValueError when `num_tokens` more do not fit."""
        if self.length + num_tokens > self.capacity:
            raise ValueError(f"cache holds {self.length} of {self.capacity} positions; {num_tokens} more do not fit")

    def take(self, input_ids: Tensor) -> Tensor:
        """Returns the ids [B, T] to compute: those that are new, or all from the first where the cache must be renewed.

        The cache then counts as empty.
        """
        if self.renewed_past is None:
            return input_ids
        self._ids.append(input_ids)
        if not 0 < self.length <= self.renewed_past < self.length + input_ids.shape[1]:
            return input_ids
        self.length = 0
        return torch.cat(self._ids, dim=1)

    def advance(self, num_tokens: int) -> None:
        """Counts `num_tokens` as filled, once all layers have written them."""
        self.length += num_tokens
