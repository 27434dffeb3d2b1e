"""A decoder-only language model: embedding, blocks, final norm, head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stoker.nn.block import Block
from stoker.nn.cache import KVCache
from stoker.nn.norm import RmsNorm
from stoker.nn.rotary import Documents, Rotary


class Decoder(nn.Module):
    """Token ids to hidden states; `logits` turns those into scores over the vocabulary.

    The head is kept apart from the forward so that a loss can run it in chunks over the trained positions only.
    `tied_head`: the head is the embedding's own weight, and there is no `head` module.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        blocks: Sequence[Block],
        final_norm: RmsNorm,
        tied_head: bool = False,
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.tied_head = tied_head
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self._rotaries = [block.attention.rotary for block in blocks]
        self._cache_shapes = [(block.attention.num_kv_heads, block.attention.head_dim) for block in blocks]
        self.final_norm = final_norm
        self.head = None if tied_head else nn.Linear(hidden_size, vocab_size, bias=head_bias)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding's weight when the head is tied to it."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V], or None."""
        return None if self.head is None else self.head.bias

    def forward(
        self,
        input_ids: Tensor,
        *,
        document_lengths: Documents | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Returns the hidden states after the final norm, [B, T, D], of `input_ids` [B, T].

        `document_lengths`: per row the lengths of its documents, which sum to T; attention and positions stay within
        them. None: every row is one document. `positions` [B, T]: instead of 0, 1, ... in every document. `cache`: the
        ids continue the positions it holds, and it is extended in place. Raises ValueError when they do not fit it.
        """
        x = self.embedding(input_ids)
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.require(input_ids.shape[1])
        tables = self._rotary_tables(input_ids, document_lengths, positions, start)
        for index, block in enumerate(self.blocks):
            cos, sin = tables[self._rotaries[index]]
            if cache is not None:
                x = block(x, cos, sin, cache=cache.layers[index], cache_length=start)
            elif block.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, document_lengths=document_lengths, use_reentrant=False)
            else:
                x = block(x, cos, sin, document_lengths=document_lengths)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: [..., D] to [..., V]."""
        return nn.functional.linear(hidden, self.head_weight, self.head_bias)

    def new_cache(self, *, capacity: int, batch_size: int = 1) -> KVCache:
        """An empty cache for `capacity` positions, on the model's device and in its dtype."""
        weight = self.embedding.weight
        return KVCache(
            self._cache_shapes, batch_size=batch_size, capacity=capacity, dtype=weight.dtype, device=weight.device
        )

    def _rotary_tables(
        self, input_ids: Tensor, document_lengths: Documents | None, positions: Tensor | None, start: int
    ) -> dict[Rotary, tuple[Tensor, Tensor]]:
        """Cosines and sines of each distinct rope of the blocks."""
        length, device = input_ids.shape[1], input_ids.device
        tables = {}
        for rotary in dict.fromkeys(self._rotaries):
            if positions is not None:
                tables[rotary] = rotary.at(positions)
            elif document_lengths is not None:
                tables[rotary] = rotary.packed(document_lengths, device)
            else:
                tables[rotary] = rotary.span(start, start + length, device)
        return tables
