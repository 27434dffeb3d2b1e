"""Causal attention over documents, without a T x T mask.

    o_t = Σ_s softmax_s(q_t · k_s · scale) v_s,   s in the same document, max(0, t − window + 1) ≤ s ≤ t

Heads are grouped: query heads h of one group share one key and value head (arXiv:2305.13245).

On a CPU, and wherever no variable-length kernel fits, documents run one after the other through PyTorch's
`scaled_dot_product_attention`, whose memory is linear in their length. A sliding window shorter than the document runs
in blocks of queries, each against the keys within reach: the only masks are [block, block + window]. On CUDA in half
precision, from Ampere on, packed rows and sliding windows take variable-length flash attention. Soft-capped scores and
sinks have their own way (`kernels/scored_attention.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stoker.kernels.ahead import is_compiling_ahead
from stoker.kernels.documents import Boundaries, DocumentLengths, boundaries_of
from stoker.kernels.head_exchange import HeadExchange
from stoker.kernels.scored_attention import FLEX_CHANNELS, Scores, capped, flex, last_positions, normalized
from stoker.kernels.shared_heads import can_share, has_flash, knows_shared_heads, repeated, shared_heads
from stoker.kernels.triton_support import check_implementation

_MAX_QUERY_BLOCK = 512


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_lengths: DocumentLengths | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula with an explicit [B, T, T] mask; the oracle of the implementations below."""
    batch, length, num_heads, head_dim = q.shape
    k, v = (x.repeat_interleave(num_heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) * (scale or head_dim**-0.5)
    rows = document_lengths or [[length]] * batch
    if isinstance(rows, Boundaries):
        rows = rows.lengths(batch, length)
    document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]).to(q.device)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    seen = seen.to(q.device) & (document[:, :, None] == document[:, None, :])
    weights = normalized(capped(scores, softcap).masked_fill(~seen[:, None], float("-inf")), sinks)
    return torch.einsum("bhts,bshe->bthe", weights, v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_lengths: DocumentLengths | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    exchange: HeadExchange | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns the attended values [B, T, H, E].

    q: [B, T, H, E]; k, v: [B, T, K, E] with H a multiple of K. `document_lengths`: for each row the lengths of its
    documents, which sum to T, or `Boundaries`; None: a row is one document. `window`: a position sees itself and the
    `window - 1` before it. `scale`: of the scores, by default E^-½. `softcap` c: scores become c tanh(scores / c).
    `sinks` [H]: a logit that joins each head's softmax and has no value. `exchange`: q, k and v are this rank's part of
    rows that its ranks share, and so is the result; `document_lengths` are still those of whole rows. `implementation`:
    "reference" or "triton". Raises ValueError for an unknown implementation, and for lengths that do not sum to T.
    """
    if exchange is not None:
        mine = None if sinks is None else exchange.mine(sinks)
        attended = attention(
            *exchange.spread(q, k, v),
            document_lengths=document_lengths,
            window=window,
            scale=scale,
            softcap=softcap,
            sinks=mine,
            implementation=implementation,
        )
        return exchange.collect(attended.flatten(2)).view(*q.shape[:3], v.shape[-1])
    is_fast = check_implementation(implementation)
    rows = _checked(document_lengths, q)
    scores = Scores(window, scale, softcap, sinks)
    # FlexAttention is compiled for the lengths that it first meets: not for those of a rehearsal.
    has_flex = is_fast and q.is_cuda and not is_compiling_ahead()
    if has_flex and not scores.are_plain and min(q.shape[-1], v.shape[-1]) >= FLEX_CHANNELS:
        return flex(q, k, v, rows, scores)
    with _fastest_kernels(q) if is_fast else nullcontext():
        return _attention(q, k, v, rows, scores)


def _checked(document_lengths: DocumentLengths | None, q: Tensor) -> DocumentLengths:
    batch, length = q.shape[:2]
    rows = document_lengths or ((length,),) * batch
    if isinstance(rows, Boundaries):
        return rows
    if len(rows) != batch or any(sum(row) != length for row in rows):
        raise ValueError(f"document_lengths must hold {batch} rows that sum to {length}")
    return rows


def _fastest_kernels(q: Tensor) -> AbstractContextManager[Any]:
    """Lets `scaled_dot_product_attention` choose in the order of speed on the device of `q`."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if has_flash(q):
        order.insert(0, SDPBackend.FLASH_ATTENTION)
    if torch.cuda.get_device_capability(q.device) >= (9, 0):
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)


def _attention(q: Tensor, k: Tensor, v: Tensor, documents: DocumentLengths, scores: Scores) -> Tensor:
    # The kernel has one size for queries, keys and values.
    fits = q.shape[-1] == v.shape[-1] and scores.are_plain and has_flash(q)
    if isinstance(documents, Boundaries):
        if fits:
            return _variable_length(q, k, v, documents, window=scores.window, scale=scores.scale)
        documents = documents.lengths(*q.shape[:2])
    lengths = [size for row in documents for size in row]
    is_packed = len(lengths) > q.shape[0]
    is_windowed = scores.window is not None and scores.window < max(lengths, default=0)
    if (is_packed or is_windowed) and fits:
        ends = boundaries_of(documents, q.device)
        return _variable_length(q, k, v, ends, window=scores.window, scale=scores.scale)
    if not is_packed:
        return _one_document(q, k, v, scores)
    # One split and one cat in each direction; slicing instead would pad every document's gradient to the whole row.
    parts = [x.flatten(0, 1).split(lengths) for x in (q, k, v)]
    outputs = [_one_document(q_i[None], k_i[None], v_i[None], scores)[0] for q_i, k_i, v_i in zip(*parts, strict=True)]
    return torch.cat(outputs).view(*q.shape[:3], v.shape[-1])


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the last T positions of a sequence of S: q [B, T, H, E], k and v [B, S, K, E], to [B, T, H, E]."""
    length, total = q.shape[1], k.shape[1]
    scores = Scores(window, scale, softcap, sinks)
    if length == total or not scores.are_plain:
        return _one_document(q, k, v, scores)
    if window is not None:
        first = max(0, total - length - window + 1)
        k, v = k[:, first:], v[:, first:]
    mask = None
    if length > 1:
        mask = _reach(length, k.shape[1], window, q.device)
    return _sdpa(q, k, v, mask=mask, scale=scale)


def _one_document(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Causal attention where each row is one document, or with scores that are not plain the end of one."""
    if not scores.are_plain:
        return last_positions(q, k, v, scores)
    length, window, scale = q.shape[1], scores.window, scores.scale
    if window is None or window >= length:
        return _sdpa(q, k, v, causal=True, scale=scale)
    block = min(window, _MAX_QUERY_BLOCK)
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first = max(0, start - window + 1)
        mask = _reach(end - start, end - first, window, q.device)
        outputs.append(_sdpa(q[:, start:end], k[:, first:end], v[:, first:end], mask=mask, scale=scale))
    return torch.cat(outputs, dim=1)


def _reach(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[num_queries, num_keys] of bool: which keys each of the last `num_queries` positions sees."""
    positions = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    distance = positions - torch.arange(num_keys, device=device)[None, :]
    return (distance >= 0) & (distance < (window or num_keys))


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """PyTorch's fused attention on [B, T, H, E]; it takes and gives transposed views, so nothing is copied."""
    if q.shape[2] != k.shape[2] and not knows_shared_heads(q):
        if causal and can_share(q, k, v):
            return shared_heads(q, k, v, scale)
        # The plain formula, which is left for shared heads, would make a matrix T x T.
        k, v = (repeated(x, q.shape[2] // k.shape[2]) for x in (k, v))
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _variable_length(
    q: Tensor, k: Tensor, v: Tensor, documents: Boundaries, *, window: int | None, scale: float | None
) -> Tensor:
    """Documents through CUDA's variable-length flash attention, which knows sliding windows too.

    It launches blocks for `longest` queries of every document; those past a document's end, and all of an empty one,
    end at once (PyTorch's flash_fwd_kernel.h and flash_bwd_kernel.h compare with the document's own length first).
    """
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    ends, longest = documents.ends, documents.longest
    # What `torch.nn.attention.varlen` calls, whose own operator is one in Python and so is its backward: both together
    # were 0.5 ms of the host in each layer, beside the kernels. This operator's derivative is PyTorch's own.
    out, *_ = torch.ops.aten._flash_attention_forward(
        flat_q,
        flat_k,
        flat_v,
        ends,
        ends,
        longest,
        longest,
        0.0,  # of the weights nothing is dropped
        window is None,  # causal; a window says so by itself
        False,
        scale=scale,
        # Flash attention counts the positions before the query, the window counts the query itself too.
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    return out.view(q.shape)
