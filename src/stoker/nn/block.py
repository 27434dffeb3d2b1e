"""One layer of a decoder."""

from torch import Tensor, nn

from stoker.nn.attention import Attention
from stoker.nn.cache import LayerCache
from stoker.nn.feed_forward import GatedFeedForward
from stoker.nn.norm import RmsNorm
from stoker.nn.rotary import Documents


class Block(nn.Module):
    """Attention, then feed-forward, each added to its input and each given the norm of it (pre-norm).

    `recompute`: the decoder drops what the block saved for backward and runs it again there.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: GatedFeedForward,
        *,
        attention_norm: RmsNorm,
        feed_forward_norm: RmsNorm,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward
        self.recompute = False

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
        mixed = self.attention(
            self.attention_norm(x), cos, sin, document_lengths=document_lengths, cache=cache, cache_length=cache_length
        )
        normed, x = self.feed_forward_norm.add(mixed, x)
        return x + self.feed_forward(normed)
