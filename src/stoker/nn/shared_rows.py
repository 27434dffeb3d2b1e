"""Lets a decoder compute a part of every row, and its attention exchange heads with the ranks that have the others."""

from stoker.kernels.head_exchange import HeadExchange
from stoker.nn.attention import Attention
from stoker.nn.decoder import Decoder
from stoker.nn.latent_attention import LatentAttention


def share_rows(decoder: Decoder, exchange: HeadExchange | None) -> None:
    """Makes `decoder` expect this rank's part of rows from here on (None: whole rows again); with a cache, whole ones.

    Everything but attention treats each position by itself, and needs nothing of the others. Call it before
    `adapters.fused_block.fuse_blocks`.

    Raises:
        ValueError: a layer's mixer passes a state from position to position, or its heads cannot be dealt out.
    """
    for number, block in enumerate(decoder.blocks):
        mixer = getattr(block, "mixing", None)
        if mixer is None:
            continue
        if not isinstance(mixer, Attention | LatentAttention):
            raise ValueError(f"layer {number} is a {type(mixer).__name__}, which ranks cannot share the rows of")
        if exchange is not None:
            exchange.repeats(mixer.num_heads, getattr(mixer, "num_kv_heads", mixer.num_heads))
        mixer.exchange = exchange
    decoder.exchange = exchange
