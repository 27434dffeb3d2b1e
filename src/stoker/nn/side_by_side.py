"""Attention and a state space that read the same input and whose outputs are added (Falcon-H1, arXiv:2507.22448)."""

import torch
from torch import Tensor, nn

from stoker.nn.attention import Attention
from stoker.nn.cache import LayerCache
from stoker.nn.mamba2 import Mamba2
from stoker.nn.rotary import Documents, Rotary
from stoker.nn.state_cache import StateCache


class SideBySideCache:
    """The caches of both."""

    def __init__(self, attention: LayerCache, state_space: StateCache) -> None:
        self.attention = attention
        self.state_space = state_space


class SideBySide(nn.Module):
    """`attention(a x) · b + state_space(c x) · d` with `attention_scales` (a, b) and `state_space_scales` (c, d)."""

    def __init__(
        self,
        attention: Attention,
        state_space: Mamba2,
        *,
        attention_scales: tuple[float, float] = (1.0, 1.0),
        state_space_scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.attention = attention
        self.state_space = state_space
        self.attention_scales = attention_scales
        self.state_space_scales = state_space_scales

    @property
    def rotary(self) -> Rotary | None:
        """The positions of the attention."""
        return self.attention.rotary

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        document_lengths: Documents | None = None,
        cache: SideBySideCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; the other arguments are those of `Attention.forward`, with a cache of both."""
        mixed = self.attention(
            _times(x, self.attention_scales[0]),
            cos,
            sin,
            document_lengths=document_lengths,
            cache=None if cache is None else cache.attention,
            cache_length=cache_length,
        )
        state = self.state_space(
            _times(x, self.state_space_scales[0]),
            document_lengths=document_lengths,
            cache=None if cache is None else cache.state_space,
        )
        return _times(mixed, self.attention_scales[1]) + _times(state, self.state_space_scales[1])

    def new_cache(self, *, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SideBySideCache:
        """Empty caches of both, the attention's for `capacity` positions."""
        return SideBySideCache(
            self.attention.new_cache(batch_size=batch_size, capacity=capacity, dtype=dtype, device=device),
            self.state_space.new_cache(batch_size=batch_size, capacity=capacity, dtype=dtype, device=device),
        )


def _times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale
