"""Grouped-query attention with rotary positions, as a module."""

from torch import Tensor, nn

from stoker.kernels.attention import attend_cached, attention
from stoker.kernels.rope import split_and_rotate
from stoker.nn.cache import LayerCache
from stoker.nn.linear import FusedLinear
from stoker.nn.rotary import Documents, Rotary


class Attention(nn.Module):
    """Causal attention of `num_heads` query heads over `num_kv_heads` key and value heads of `head_dim` channels.

    `qkv_names`, `out_names`: the Hugging Face module names of q, k, v and of the output projection. `window`: a
    position sees itself and the `window - 1` before it; None: all before it.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: Rotary,
        qkv_names: tuple[str, ...],
        out_names: tuple[str, ...],
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rotary = rotary
        self.window = window
        self.kernels = kernels
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.qkv = FusedLinear(hidden_size, sizes, names=qkv_names, bias=qkv_bias)
        self.out = FusedLinear(num_heads * head_dim, (hidden_size,), names=out_names, bias=out_bias)

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
        """x [B, T, D] to [B, T, D]; cos and sin [1 or B, T, E/2] from `rotary`.

        With a cache, x continues the `cache_length` positions that it holds, and its keys and values are written there.
        """
        q, k, v = split_and_rotate(
            self.qkv(x),
            cos,
            sin,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            implementation=self.kernels,
        )
        if cache is None:
            mixed = attention(
                q, k, v, document_lengths=document_lengths, window=self.window, implementation=self.kernels
            )
        else:
            mixed = attend_cached(q, *cache.write(cache_length, k, v), window=self.window)
        return self.out(mixed.flatten(2))
