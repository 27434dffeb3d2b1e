"""Rows that several ranks share: each has a part of every row, and for attention whole rows with a part of the heads.

    q, k, v  [B, T/n, heads, E]  ──all-to-all──▶  [B, T, heads/n, E]  ─ attention ─▶  ──all-to-all──▶  [B, T/n, H · E]

This is DeepSpeed-Ulysses (arXiv:2309.14509). Attention sees whole rows, so that documents, windows, soft-caps and sinks
need nothing of their own, and any kernel runs it; every rank has equally much to do, whatever the documents. Both
directions only move values about: each is the other's inverse and its adjoint, so that a backward is the other one.

Key and value heads fewer than n are repeated first, as often as it takes to give every rank one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class HeadExchange:
    """The exchange of one group of ranks, of which this is number `index` of `size`; `group` None: of all ranks.

    Every rank of the group must call each method, in the same order, with tensors of the same shape. Nothing here is
    differentiable but `spread`, `collect` and `sum`.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, index: int, size: int) -> None:
        self.group, self.index, self.size = group, index, size

    def repeats(self, num_heads: int, num_kv_heads: int) -> int:
        """Returns how often each key and value head is repeated, so that `size` divides them evenly.

        Raises:
            ValueError: `size` does not divide the query heads.
        """
        if num_heads % self.size:
            raise ValueError(f"{num_heads} heads cannot be dealt out to {self.size} ranks")
        groups = num_heads // num_kv_heads
        return next(n for n in range(1, groups + 1) if groups % n == 0 and num_kv_heads * n % self.size == 0)

    def mine(self, per_head: Tensor) -> Tensor:
        """Returns the part of `per_head` [H] that belongs to this rank's heads."""
        return per_head.chunk(self.size)[self.index]

    def to_heads(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Returns whole rows with this rank's heads, [B, T, heads_i/n, E], of parts of rows [B, T/n, heads_i, E].

        All go in one message, and the results are views of one tensor.
        """
        batch, length, _, channels = heads[0].shape
        counts = [x.shape[2] // self.size for x in heads]
        sent = heads[0].new_empty(self.size, batch, length, sum(counts), channels)
        for slot, x in zip(sent.split(counts, dim=3), heads, strict=True):
            slot.copy_(x.unflatten(2, (self.size, -1)).movedim(2, 0))
        # Of one row, parts that came one after the other are the row: nothing is copied.
        whole = self._exchanged(sent).transpose(0, 1).flatten(1, 2)
        return whole.split(counts, dim=2)

    def to_rows(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Returns parts of rows with all heads, [B, T/n, heads_i, E], of whole rows [B, T, heads_i/n, E]."""
        batch, total, _, channels = heads[0].shape
        counts = [x.shape[2] for x in heads]
        sent = heads[0].new_empty(self.size, batch, total // self.size, sum(counts), channels)
        for slot, x in zip(sent.split(counts, dim=3), heads, strict=True):
            slot.copy_(x.unflatten(1, (self.size, -1)).transpose(0, 1))
        parts = self._exchanged(sent).split(counts, dim=3)
        return tuple(part.movedim(0, 2).flatten(2, 3) for part in parts)

    def attended_to_rows(self, attended: Tensor) -> Tensor:
        """Returns [B, T/n, H · E] of attended values [B, T, H/n · E] of this rank's heads."""
        return self.to_rows(attended[:, :, None])[0].flatten(2)

    def attended_to_heads(self, rows: Tensor) -> Tensor:
        """Returns [B, T, H/n · E] of [B, T/n, H · E]: the other way, as gradients go."""
        return self.to_heads(rows.unflatten(2, (self.size, -1)))[0].flatten(2)

    def queries_to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """`to_heads` of q [B, T/n, H, E] and of k and v [B, T/n, K, E], whose heads are repeated where they are few."""
        times = self.repeats(q.shape[2], k.shape[2])
        return self.to_heads(q, *(x.repeat_interleave(times, dim=2) if times > 1 else x for x in (k, v)))

    def queries_to_rows(self, grads: Sequence[Tensor], num_kv_heads: int) -> tuple[Tensor, ...]:
        """Gradients of q, k and v from those of `queries_to_heads`' results: those of a repeated head are added up."""
        q, *rest = self.to_rows(*grads)
        times = rest[0].shape[2] // num_kv_heads
        return q, *(x.unflatten(2, (num_kv_heads, times)).sum(3) if times > 1 else x for x in rest)

    def spread(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`queries_to_heads`, with gradients."""
        return _Spread.apply(self, q, k, v)

    def collect(self, attended: Tensor) -> Tensor:
        """`attended_to_rows`, with a gradient."""
        return _Collect.apply(self, attended)

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over the group's ranks; the gradient of `values` is the sum of theirs."""
        return _Sum.apply(self, values)

    def _exchanged(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.num_kv_heads = exchange, k.shape[2]
        return exchange.queries_to_heads(q, k, v)

    @staticmethod
    # autograd's own type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return None, *ctx.exchange.queries_to_rows(grads, ctx.num_kv_heads)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, attended: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.attended_to_rows(attended)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return None, ctx.exchange.attended_to_heads(grads[0])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, values: Tensor) -> Tensor:
        ctx.exchange = exchange
        total = values.clone()
        dist.all_reduce(total, group=exchange.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.exchange.group)
        return None, total
