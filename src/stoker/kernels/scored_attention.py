"""Causal attention whose scores are soft-capped, or whose softmax has a sink; no T x T matrix exists at once.

    s = q · k · scale           with a soft-cap c (Gemma 2, arXiv:2408.00118):  s = c tanh(s / c)
    o = Σ exp(s) v / Σ exp(s)   with a sink b of the head (gpt-oss, arXiv:2309.17453):  Σ exp(s) + exp(b) below

PyTorch's fused attention knows neither. The reference takes queries in blocks against the keys within reach, and makes
their scores again in the backward. On CUDA FlexAttention compiles one kernel, with a block mask built from the
documents' lengths, and the sink enters through the log-sum of the scores: o = o' σ(log Σ exp(s) - b).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stoker.kernels.documents import Boundaries, DocumentLengths, positions_in_documents

_QUERY_BLOCK = 512
_FLEX_BLOCK = 128
FLEX_CHANNELS = 16
"""The fewest channels of a head that FlexAttention's kernel takes."""


class Scores(NamedTuple):
    """How scores are made: `window` as in `attention`, `scale` None for E^-½, `softcap`, and `sinks` [H]."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def are_plain(self) -> bool:
        """Whether PyTorch's fused attention knows them."""
        return self.softcap is None and self.sinks is None


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """The scores after the soft-cap, if there is one."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def normalized(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax over the last dimension of [B, H, T, S], with `sinks` [H] as a column that is dropped again."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def last_positions(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attention of the last T positions of documents of S: q [B, T, H, E], k, v [B, S, K, E], to [B, T, H, E]."""
    length, total = q.shape[1], k.shape[1]
    outputs = []
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        stop = total - length + end
        first = 0 if scores.window is None else max(0, total - length + start - scores.window + 1)
        block = (q[:, start:end], k[:, first:stop], v[:, first:stop], scores)
        outputs.append(checkpoint(_block, *block, use_reentrant=False) if torch.is_grad_enabled() else _block(*block))
    return torch.cat(outputs, dim=1) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1])


def _block(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """The last T of S positions with all their scores at once."""
    num_queries, num_heads, head_dim = q.shape[1:]
    num_keys, groups = k.shape[1], num_heads // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v))
    products = torch.einsum("bthe,bshe->bhts", q, k).float() * (scores.scale or head_dim**-0.5)
    position = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    distance = position - torch.arange(num_keys, device=q.device)[None, :]
    seen = (distance >= 0) & (distance < (scores.window or num_keys))
    weights = normalized(capped(products, scores.softcap).masked_fill(~seen, float("-inf")), scores.sinks)
    return torch.einsum("bhts,bshe->bthe", weights.to(v.dtype), v)


def flex(q: Tensor, k: Tensor, v: Tensor, documents: DocumentLengths, scores: Scores) -> Tensor:
    """Attention of whole rows on CUDA: q [B, T, H, E], k, v [B, T, K, E]."""
    from torch.nn.attention.flex_attention import AuxRequest

    out, kept = _compiled()(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if scores.softcap is None else _softcap(scores.softcap),
        block_mask=_mask(documents, scores.window, q.shape[0], q.shape[1], q.device),
        scale=scores.scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=scores.sinks is not None),
        # Short rows would have a kernel of their own, made for decoding.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    if scores.sinks is not None:
        share = torch.sigmoid(kept.lse - scores.sinks.float()[None, :, None])
        out = (out * share[..., None]).to(q.dtype)
    return out.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    # The second cap that a process meets would be compiled as any, which its backward does not take. Entered
    # in 14 us; one made for each call would cost 39.
    each_cap = dynamo.patch(specialize_float=True)  # pyrefly: ignore[missing-attribute]

    def call(*args: Any, **options: Any) -> Any:
        with each_cap:
            return compiled(*args, **options)

    return call


@lru_cache(maxsize=16)
def _softcap(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's score modification, one function object for each cap, so that it is compiled once."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _mask(documents: DocumentLengths, window: int | None, num_rows: int, length: int, device: torch.device) -> Any:
    """The mask of a micro-batch's layers with this window, made once where rows are packed.

    Not where each is one document: a CUDA graph may read it, and what is kept here does not live as long.
    """

    def make() -> Any:
        return block_mask(first_seen(documents, window, num_rows, length, device), device)

    if isinstance(documents, Boundaries):
        return documents.once(("mask", window, num_rows, length), make)
    if all(len(row) == 1 for row in documents):
        return make()
    return _kept_mask(tuple(tuple(row) for row in documents), window, length, device)


@lru_cache(maxsize=4)
def _kept_mask(rows: tuple[tuple[int, ...], ...], window: int | None, length: int, device: torch.device) -> Any:
    with torch.inference_mode(mode=False):
        return block_mask(first_seen(rows, window, len(rows), length, device), device)


def first_seen(
    documents: DocumentLengths, window: int | None, num_rows: int, length: int, device: torch.device
) -> Tensor:
    """int32 [B, T], on the device: the first position that each position sees, by its document and the window."""
    position = torch.arange(length, dtype=torch.int32, device=device)
    first = position - positions_in_documents(documents, num_rows, length, device)
    return first if window is None else torch.maximum(first, position - window + 1)


def block_mask(first: Tensor, device: torch.device, size: int = _FLEX_BLOCK) -> Any:
    """FlexAttention's mask from `first` [B, T] of `first_seen`, which grows along a row; made without a [T, T] tensor.

    A block of queries needs the blocks of keys from the first that its first query sees up to its own; in those that
    its last query sees whole, and that lie before it, nothing is masked.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = first.shape[1]
    count = -(-length // size)
    own = torch.arange(count, device=first.device)
    last = torch.clamp(own * size + size, max=length) - 1
    lowest = first[:, own * size].long() // size
    whole_from = torch.minimum(-(-first[:, last].long() // size), own)
    partial_low = whole_from - lowest  # blocks below the whole ones, of which some queries see a part
    offset = torch.arange(count, device=first.device)
    partial = torch.where(
        offset < partial_low[..., None], lowest[..., None] + offset, own[None, :, None].expand(*lowest.shape, count)
    )
    whole = torch.where(offset < (own - whole_from)[..., None], whole_from[..., None] + offset, 0)
    on_device = first.to(device)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        return (key <= query) & (key >= on_device[batch, query])

    def placed(tensor: Tensor) -> Tensor:
        return tensor[:, None].to(device=device, dtype=torch.int32).contiguous()

    return BlockMask.from_kv_blocks(
        placed(partial_low + 1),
        placed(partial),
        placed(own - whole_from),
        placed(whole),
        BLOCK_SIZE=size,
        mask_mod=seen,
        seq_lengths=(length, length),
    )
