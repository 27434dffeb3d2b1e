"""Causal depthwise convolution over time of width W, channels last: the short convolution of Mamba (arXiv:2312.00752).

    v_tc = b_c + Σ_k w_ck · x_{t−W+1+k, c}        y = v, or v · σ(v) (SiLU)

    dv = dy, or dy · σ(v) (1 + v (1 − σ(v)))
    dx_sc = Σ_k w_ck · dv_{s+W−1−k, c}            dw_ck = Σ_t dv_tc · x_{t−W+1+k, c}        db_c = Σ_t dv_tc

Terms whose two positions lie in different documents, or before the row's first position, are left out. Saved for
backward: the inputs alone. Sums are fp32 whatever the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stoker.kernels.documents import DocumentLengths, document_ids
from stoker.kernels.triton_support import check_implementation


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = True, documents: Tensor | None = None
) -> Tensor:
    """The formula, tap by tap; `documents` as `document_ids` gives them. The oracle of the implementations below."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, taps = x.to(dtype), weight.to(dtype).unbind(1)
    out = wide * taps[-1]
    for distance in range(1, min(len(taps), x.shape[1])):
        tap = F.pad(wide[:, :-distance], (0, 0, distance, 0)) * taps[-1 - distance]
        if documents is not None:
            same = F.pad(documents[:, distance:] == documents[:, :-distance], (distance, 0))
            tap = tap * same.unsqueeze(-1)
        out = out + tap
    if bias is not None:
        out = out + bias.to(dtype)
    return (F.silu(out) if silu else out).to(x.dtype)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = True,
    document_lengths: DocumentLengths | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns the convolution [B, T, C], through SiLU if `silu`, in the dtype of `x`.

    x: [B, T, C], any view whose channels are contiguous; weight: [C, W], its last column is that of the position
    itself; bias: [C]. `document_lengths`: for each row the lengths of its documents; None: a row is one document.
    `implementation`: "reference" or "triton"; ValueError for an unknown one, and for lengths that do not sum to T.
    """
    documents = document_ids(document_lengths, x.shape[0], x.shape[1], x.device)
    if check_implementation(implementation):
        raise NotImplementedError
    return causal_conv_reference(x, weight, bias, silu=silu, documents=documents)


def causal_conv_cached(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns the convolution of x [B, T, C] that follows `window`, and the window for what follows x; no gradients.

    window: [B, W - 1, C], the inputs before x, zeros at a row's start. For decoding: T is one or a few positions.
    """
    inputs = torch.cat((window.to(x.dtype), x), dim=1)
    before = window.shape[1]
    out = causal_conv_reference(inputs, weight, bias, silu=silu)[:, before:]
    return out, inputs[:, inputs.shape[1] - before :].contiguous()
