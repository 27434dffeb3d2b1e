"""Grouped-query attention, as a module."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from stoker.kernels.attention import attend_cached, attention
from stoker.kernels.head_exchange import HeadExchange
from stoker.kernels.head_norm import norm_split_and_rotate
from stoker.kernels.rope import rotate, split_and_rotate
from stoker.nn.cache import LayerCache
from stoker.nn.linear import FusedLinear
from stoker.nn.norm import RmsNorm
from stoker.nn.rotary import Documents, Rotary


class Attention(nn.Module):
    """Causal attention of `num_heads` query heads over `num_kv_heads` key and value heads of `head_dim` channels.

    `rotary` turns the first channels of each head (`interleaved`: neighbours together); None: no positions.
    `qkv_names`, `out_names`: the Hugging Face module names of q, k, v (or of the one that holds them) and of the output
    projection. `grouped`: its rows hold, for each key/value head, the queries that share it, the key and the value.
    `q_norm`, `k_norm`: applied before the rotation, to each head or (`norm_all_heads`) to all as one vector; `clip`
    bounds q, k and v. `window`: a position sees itself and the `window - 1` before it; None: all before it. `scale`,
    `softcap` and `sinks` are those of `kernels.attention.attention`, and so is the attribute `exchange`, which
    `nn.shared_rows` sets.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: Rotary | None,
        qkv_names: tuple[str, ...],
        out_names: tuple[str, ...],
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        interleaved: bool = False,
        grouped: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm_all_heads: bool = False,
        clip: float | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: nn.Parameter | None = None,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rotary = rotary
        self.interleaved = interleaved
        self.grouped = grouped
        self.norm_all_heads = norm_all_heads
        self.clip = clip
        self.window = window
        self.scale = scale
        self.softcap = softcap
        self.kernels = kernels
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.qkv = FusedLinear(
            hidden_size, sizes if len(qkv_names) == 3 else (sum(sizes),), names=qkv_names, bias=qkv_bias
        )
        self.out = FusedLinear(num_heads * head_dim, (hidden_size,), names=out_names, bias=out_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.sinks = sinks
        self.exchange: HeadExchange | None = None

    @property
    def only_turns(self) -> bool:
        """Whether q, k and v are blocks of rows, and all that happens to them is a rotation.

        Then one pass splits and turns them, and the layer kernel can run them.
        """
        return self.q_norm is None and self.clip is None and not self.grouped and self.rotary is not None

    @property
    def only_norms_and_turns(self) -> bool:
        """Whether heads are normed one by one with one weight, then turned whole by halves, which one pass does."""
        is_plain = self.clip is None and not (self.grouped or self.interleaved or self.norm_all_heads)
        is_normed = isinstance(self.q_norm, RmsNorm) and self.q_norm.weight is not None
        return is_plain and is_normed and self.rotary is not None and self.rotary.dim == self.head_dim

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        document_lengths: Documents | None = None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; cos and sin [1 or B, T, R/2] from `rotary`, None without one.

        With a cache, x continues the `cache_length` positions that it holds, and its keys and values are written there.
        """
        context: Any = {"document_lengths": document_lengths, "cache": cache, "cache_length": cache_length}
        return self.out(self.attended(x, cos, sin, **context))

    def attended(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        document_lengths: Documents | None = None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """The values that each position has gathered, [B, T, H · E]: what `out` is applied to. As `forward`."""
        q, k, v = self._heads(self.qkv(x), cos, sin)
        scores = {"window": self.window, "scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        if cache is None:
            context = {"document_lengths": document_lengths, "exchange": self.exchange}
            mixed = attention(q, k, v, implementation=self.kernels, **context, **scores)
        else:
            mixed = attend_cached(q, *cache.write(cache_length, k, v), **scores)
        return mixed.flatten(2)

    def new_cache(self, *, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """An empty cache for `capacity` positions."""
        shape = (batch_size, capacity, self.num_kv_heads, self.head_dim)
        return LayerCache.empty(shape, dtype=dtype, device=device)

    def _heads(self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, E], k and v [B, T, K, E], ready for the scores."""
        if self.only_turns and cos is not None and sin is not None:
            return split_and_rotate(
                qkv,
                cos,
                sin,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                interleaved=self.interleaved,
                implementation=self.kernels,
            )
        if self.only_norms_and_turns and cos is not None and sin is not None:
            q_norm, k_norm = cast("RmsNorm", self.q_norm), cast("RmsNorm", self.k_norm)
            return norm_split_and_rotate(
                qkv,
                q_norm.factor,
                k_norm.factor,
                cos,
                sin,
                epsilon=q_norm.epsilon,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                implementation=self.kernels,
            )
        q, k, v = self._split(qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (self._normed(norm, heads) for norm, heads in ((self.q_norm, q), (self.k_norm, k)))
        if self.clip is not None:
            q, k, v = (heads.clamp(-self.clip, self.clip) for heads in (q, k, v))
        if cos is not None and sin is not None:
            q, k = rotate(q, k, cos, sin, interleaved=self.interleaved, implementation=self.kernels)
        return q, k, v

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        if not self.grouped:
            q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
            return q, k, v
        groups = heads.unflatten(2, (self.num_kv_heads, -1))
        q, k, v = groups.split((self.num_heads // self.num_kv_heads, 1, 1), dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)

    def _normed(self, norm: nn.Module, heads: Tensor) -> Tensor:
        return norm(heads.flatten(2)).view(heads.shape) if self.norm_all_heads else norm(heads)
