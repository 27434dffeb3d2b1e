"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), as a module."""

import torch
from torch import Tensor, nn

from stoker.kernels.attention import attend_cached, attention
from stoker.kernels.head_exchange import HeadExchange
from stoker.kernels.rope import rotate
from stoker.nn.cache import LayerCache
from stoker.nn.linear import FusedLinear
from stoker.nn.norm import Norm
from stoker.nn.rotary import Documents, Rotary


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from a latent vector of `latent_rank` channels a position.

    Of each head's query and key, `nope_dim` channels have no positions and those of `rotary` turn (`interleaved`:
    neighbours together); the turned key is shared by all heads. Queries come through a latent vector of `query_rank`
    channels, with a norm `q_norm`, or straight from the input (None). `down_names`: the Hugging Face module names of
    the projections of queries (or their latent) and of the latent; `query_up_names`, `up_names`, `out_names`: of the
    rest. `scale` of the scores, by default one over the root of a query's channels. `exchange`: as in `Attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        query_rank: int | None,
        latent_rank: int,
        nope_dim: int,
        value_dim: int,
        rotary: Rotary,
        interleaved: bool,
        q_norm: Norm | None,
        kv_norm: Norm,
        down_names: tuple[str, ...],
        query_up_names: tuple[str, ...],
        up_names: tuple[str, ...],
        out_names: tuple[str, ...],
        scale: float | None = None,
        bias: bool = False,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_rank = query_rank
        self.latent_rank = latent_rank
        self.nope_dim = nope_dim
        self.value_dim = value_dim
        self.rotary = rotary
        self.interleaved = interleaved
        self.head_dim = nope_dim + rotary.dim
        self.scale = scale
        self.kernels = kernels
        queries = num_heads * self.head_dim
        self.down = FusedLinear(
            hidden_size, (query_rank or queries, latent_rank + rotary.dim), names=down_names, bias=bias
        )
        self.q_norm = q_norm
        self.query_up = None if query_rank is None else FusedLinear(query_rank, (queries,), names=query_up_names)
        self.kv_norm = kv_norm
        self.up = FusedLinear(latent_rank, (num_heads * (nope_dim + value_dim),), names=up_names)
        self.out = FusedLinear(num_heads * value_dim, (hidden_size,), names=out_names, bias=bias)
        self.exchange: HeadExchange | None = None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        document_lengths: Documents | None = None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; the other arguments are those of `Attention.forward`."""
        q, k, v = self._heads(x, cos, sin)
        if cache is None:
            context = {"document_lengths": document_lengths, "exchange": self.exchange}
            mixed = attention(q, k, v, scale=self.scale, implementation=self.kernels, **context)
        else:
            mixed = attend_cached(q, *cache.write(cache_length, k, v), scale=self.scale)
        return self.out(mixed[..., : self.value_dim].flatten(2))

    def new_cache(self, *, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """An empty cache for `capacity` positions, of whole keys and values, not of the latent vector."""
        return LayerCache.empty((batch_size, capacity, self.num_heads, self.head_dim), dtype=dtype, device=device)

    def _heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [B, T, H, E]; v has zeros after its own channels, because fast kernels want one E."""
        first, shared = self.down(x).split(self.down.out_features, dim=-1)
        if self.q_norm is not None and self.query_up is not None:
            first = self.query_up(self.q_norm(first))
        latent, k_turned = shared.split((self.latent_rank, self.rotary.dim), dim=-1)
        k, v = (
            self.up(self.kv_norm(latent))
            .unflatten(-1, (self.num_heads, -1))
            .split((self.nope_dim, self.value_dim), dim=-1)
        )
        q, q_turned = first.unflatten(-1, (self.num_heads, -1)).split((self.nope_dim, self.rotary.dim), dim=-1)
        q_turned, k_turned = rotate(
            q_turned, k_turned[:, :, None], cos, sin, interleaved=self.interleaved, implementation=self.kernels
        )
        q = torch.cat((q, q_turned), dim=-1)
        k = torch.cat((k, k_turned.expand(-1, -1, self.num_heads, -1)), dim=-1)
        return q, k, nn.functional.pad(v, (0, self.head_dim - self.value_dim))
