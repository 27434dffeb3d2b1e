"""Causal attention over documents, without a T x T mask.

    o_t = Σ_s softmax_s(q_t · k_s · scale) v_s,   s in the same document, max(0, t − window + 1) ≤ s ≤ t

Heads are grouped: query heads h of one group share one key and value head (arXiv:2305.13245).

On a CPU, and wherever no variable-length kernel fits, documents run one after the other through PyTorch's
`scaled_dot_product_attention`, whose memory is linear in their length. A sliding window shorter than the document runs
in blocks of queries, each against the keys within reach: the only masks are [block, block + window]. On CUDA in half
precision, packed rows and sliding windows take `torch.nn.attention.varlen`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stoker.kernels.triton_support import check_implementation

DocumentLengths = Sequence[Sequence[int]]

_MAX_QUERY_BLOCK = 512


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_lengths: DocumentLengths | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The formula with an explicit [B, T, T] mask; the oracle of the implementations below."""
    batch, length, num_heads, head_dim = q.shape
    k, v = (x.repeat_interleave(num_heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) * (scale or head_dim**-0.5)
    rows = document_lengths or [[length]] * batch
    document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]).to(q.device)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    seen = seen.to(q.device) & (document[:, :, None] == document[:, None, :])
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_lengths: DocumentLengths | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns the attended values [B, T, H, E].

    q: [B, T, H, E]; k, v: [B, T, K, E] with H a multiple of K. `document_lengths`: for each row the lengths of its
    documents, which sum to T; None: a row is one document. `window`: a position sees itself and the `window - 1` before
    it. `scale`: of the scores, by default E^-½. `implementation`: "reference" or "triton". Raises ValueError for an
    unknown implementation, and for lengths that do not sum to T.
    """
    with _fastest_kernels(q) if check_implementation(implementation) else nullcontext():
        return _attention(q, k, v, document_lengths=document_lengths, window=window, scale=scale)


def _fastest_kernels(q: Tensor) -> AbstractContextManager[Any]:
    """Lets `scaled_dot_product_attention` choose in the order of speed on the device of `q`."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.cuda.get_device_capability(q.device) >= (9, 0):
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_lengths: DocumentLengths | None,
    window: int | None,
    scale: float | None,
) -> Tensor:
    batch, length = q.shape[:2]
    rows = document_lengths or ((length,),) * batch
    if len(rows) != batch or any(sum(row) != length for row in rows):
        raise ValueError(f"document_lengths must hold {batch} rows that sum to {length}")
    lengths = [size for row in rows for size in row]
    is_packed = len(lengths) > batch
    is_windowed = window is not None and window < max(lengths, default=0)
    if (is_packed or is_windowed) and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _variable_length(q, k, v, lengths, window=window, scale=scale)
    if not is_packed:
        return _one_document(q, k, v, window, scale)
    # One split and one cat in each direction; slicing instead would pad every document's gradient to the whole row.
    parts = [x.flatten(0, 1).split(lengths) for x in (q, k, v)]
    outputs = [
        _one_document(q_i[None], k_i[None], v_i[None], window, scale)[0] for q_i, k_i, v_i in zip(*parts, strict=True)
    ]
    return torch.cat(outputs).view(q.shape)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
    """Attention of the last T positions of a sequence of S: q [B, T, H, E], k and v [B, S, K, E], to [B, T, H, E]."""
    length, total = q.shape[1], k.shape[1]
    if length == total:
        return _one_document(q, k, v, window, scale)
    if window is not None:
        first = max(0, total - length - window + 1)
        k, v = k[:, first:], v[:, first:]
    mask = None
    if length > 1:
        mask = _reach(length, k.shape[1], window, q.device)
    return _sdpa(q, k, v, mask=mask, scale=scale)


def _one_document(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Causal attention where each row is one document."""
    length = q.shape[1]
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
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, window: int | None, scale: float | None
) -> Tensor:
    """Documents through CUDA's variable-length flash attention, which knows sliding windows too."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    # Flash attention counts the positions before the query, the window counts the query itself too.
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[2] != k.shape[2]
    else:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    ends = torch.tensor([0, *lengths], device=q.device).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out: Any = varlen_attn(flat_q, flat_k, flat_v, ends, ends, longest, longest, **options)
    return out.view(q.shape)
