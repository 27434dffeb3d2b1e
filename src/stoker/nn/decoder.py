"""A decoder-only language model: embedding, blocks, final norm, head."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stoker.kernels.documents import positions_in_documents
from stoker.kernels.head_exchange import HeadExchange
from stoker.kernels.rounded_head import RoundedHead
from stoker.nn.block import Block
from stoker.nn.cache import KVCache
from stoker.nn.moe import Experts
from stoker.nn.norm import Norm
from stoker.nn.rotary import Documents, Rotary

_Tables = tuple[Tensor | None, Tensor | None]


class Decoder(nn.Module):
    """Token ids to hidden states; `logits` turns those into scores over the vocabulary.

    The head is kept apart from the forward so that a loss can run it in chunks over the trained positions only.
    `tied_head`: the head is the embedding's own weight, and there is no `head` module. `embedding_scale` multiplies the
    embeddings; `learned_positions` rows of a table are added to them, the first `position_offset` of which are never
    used (0: no table). `logit_scale` multiplies the logits, which `logit_softcap` c then makes c tanh(logits / c).
    `exchange`, which `nn.shared_rows` sets: without a cache, a forward is given this rank's part of rows.
    `rounded_head`: the head's weight in fp8, by which a loss may run while it is frozen.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        blocks: Sequence[Block],
        final_norm: Norm,
        tied_head: bool = False,
        head_bias: bool = False,
        embedding_scale: float = 1.0,
        learned_positions: int = 0,
        position_offset: int = 0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.tied_head = tied_head
        self.embedding_scale = embedding_scale
        self.position_offset = position_offset
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(learned_positions, hidden_size) if learned_positions else None
        self.blocks = nn.ModuleList(blocks)
        self._rotaries: list[Rotary | None] = [getattr(block.mixing, "rotary", None) for block in blocks]
        lengths = [rotary.renewed_past for rotary in self._rotaries if rotary is not None]
        self._renewed_past = min((length for length in lengths if length is not None), default=None)
        self.final_norm = final_norm
        self.head = None if tied_head else nn.Linear(hidden_size, vocab_size, bias=head_bias)
        self.exchange: HeadExchange | None = None
        self.rounded_head: RoundedHead | None = None

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

        `document_lengths`: per row the lengths of its documents, which sum to T, or `Boundaries`; attention and
        positions stay within them. None: every row is one document. `positions` [B, T]: instead of 0, 1, ... in every
        document. `cache`: the
        ids continue the positions it holds, and it is extended in place. Raises ValueError when they do not fit it.
        With an `exchange`, ids and hidden states are this rank's part, and all else is said of whole rows.
        """
        num_new = input_ids.shape[1]
        if cache is not None:
            cache.require(num_new)
            input_ids = cache.take(input_ids)
        start = 0 if cache is None else cache.length
        exchange = self.exchange if cache is None else None
        # A cache may give ids back that are to be computed again.
        length = input_ids.shape[1] * (1 if exchange is None else exchange.size)
        x = self._embed(input_ids, document_lengths, positions, start, length)
        tables = self._rotary_tables(input_ids, document_lengths, positions, start, length)
        for index, block in enumerate(self.blocks):
            cos, sin = tables[self._rotaries[index]]
            if cache is not None:
                x = block(x, cos, sin, cache=cache.layers[index], cache_length=start)
            elif block.recompute and torch.is_grad_enabled():
                x = cast("Block", block).recomputed(x, cos, sin, document_lengths=document_lengths)
            else:
                x = block(x, cos, sin, document_lengths=document_lengths)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.final_norm(x[:, -num_new:])

    def balancing(self) -> tuple[list[Tensor], float, int]:
        """What a load-balancing loss is made of: the routers' logits of the last training forward, [B T, E] each, its
        coefficient (0 where the model has none), and how many experts a token has."""
        mixtures = [m for m in self.modules() if isinstance(m, Experts) and m.auxiliary_loss > 0.0]
        logits = [m.router_logits for m in mixtures if m.router_logits is not None]
        return logits, mixtures[0].auxiliary_loss if logits else 0.0, mixtures[0].router.top_k if logits else 0

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: [..., D] to [..., V]."""
        return self.scaled(nn.functional.linear(hidden, self.head_weight, self.head_bias))

    def scaled(self, scores: Tensor) -> Tensor:
        """Logits from what the head's product gives: multiplied by `logit_scale`, then capped."""
        if self.logit_scale != 1.0:
            scores = scores * self.logit_scale
        if self.logit_softcap is not None:
            scores = self.logit_softcap * torch.tanh(scores / self.logit_softcap)
        return scores

    def new_cache(self, *, capacity: int, batch_size: int = 1) -> KVCache:
        """An empty cache for `capacity` positions, on the model's device and in its dtype."""
        weight = self.embedding.weight
        options = {"batch_size": batch_size, "capacity": capacity, "dtype": weight.dtype, "device": weight.device}
        mixers: list[Any] = [block.mixing for block in self.blocks]
        layers = [None if mixer is None else mixer.new_cache(**options) for mixer in mixers]
        return KVCache(layers, capacity=capacity, renewed_past=self._renewed_past)

    def _embed(
        self,
        input_ids: Tensor,
        document_lengths: Documents | None,
        positions: Tensor | None,
        start: int,
        length: int,
    ) -> Tensor:
        """The embeddings [B, T, D] of the ids, scaled, with those of their positions in rows of `length`."""
        x = self.embedding(input_ids)
        if self.embedding_scale != 1.0:
            # Rounded to the dtype first, as the models whose embeddings are scaled by a root were trained.
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype).item()
        if self.position_embedding is None:
            return x
        if positions is None and document_lengths is not None:
            positions = positions_in_documents(document_lengths, input_ids.shape[0], length, input_ids.device)
        if positions is None:
            positions = torch.arange(start, start + length, device=input_ids.device)[None]
        return x + self.position_embedding(self._part(positions, input_ids) + self.position_offset)

    def _rotary_tables(
        self,
        input_ids: Tensor,
        document_lengths: Documents | None,
        positions: Tensor | None,
        start: int,
        length: int,
    ) -> dict[Rotary | None, _Tables]:
        """Cosines and sines of each distinct rope of the blocks; none for blocks without one."""
        device = input_ids.device
        tables: dict[Rotary | None, _Tables] = {None: (None, None)}
        for rotary in dict.fromkeys(self._rotaries):
            if rotary is None:
                continue
            if positions is not None:
                table = rotary.at(positions)
            elif document_lengths is not None:
                table = rotary.packed(document_lengths, input_ids.shape[0], length, device)
            else:
                table = rotary.span(start, start + length, device)
            tables[rotary] = (self._part(table[0], input_ids), self._part(table[1], input_ids))
        return tables

    def _part(self, of_rows: Tensor, input_ids: Tensor) -> Tensor:
        """What of [B, T, ...] belongs to the ids: all of it, or with an `exchange` this rank's part of the rows."""
        length = input_ids.shape[1]
        if self.exchange is None or of_rows.shape[1] == length:
            return of_rows
        return of_rows[:, self.exchange.index * length : (self.exchange.index + 1) * length].contiguous()
