"""A frozen head in fp8: its product with hidden states, and that of the logits' gradient with it.

    z[n] = s r[n] (e4m3(h[n] / r[n]) Qᵀ)        dh[n] = s t[n] (e4m3(dz[n] / t[n]) Q)        Q = e4m3(W / s)

W has one scale s: rows' own would have to be read beside every logit. e4m3 holds four orders of magnitude at the same
three bits, so that rows far smaller than the largest lose nothing by it. r are the scales of hidden states, t those of
the gradient's rows (`turn_logits`): the value of a row's target, which is its largest, is exact.

Sums are not left to the tensor core's own registers: their 14 bits would cut small values that are added to the
target's, 128,256 of them in an 8B. That costs the gradient a fifth of its product's time, and logits nothing (H200).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels.fp8 import FP8, FP8_MAX, plain_matmul

_ROWS_AT_ONCE = 4096


class RoundedHead(NamedTuple):
    """A head's weight `[V, D]` in e4m3, the same transposed `[D, V]`, and the scale of both, a float32 scalar."""

    values: Tensor
    transposed: Tensor
    scale: Tensor

    def logits(self, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Returns the product with hidden states in e4m3 `[N, D]`, bf16 `[N, V]`, without any scale."""
        return plain_matmul(rows, self.values, out=out)

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """Returns that with the gradient of logits in e4m3 `[N, V]`, bf16 `[N, D]`, without any scale."""
        return plain_matmul(gradient, self.transposed)


def round_head(weight: Tensor) -> RoundedHead:
    """Returns a head's `weight` `[V, D]` in fp8, on its device."""
    num_rows, num_columns = weight.shape
    pieces = weight.detach().split(_ROWS_AT_ONCE)  # as a whole in fp32 it would be the largest thing in memory
    scale = torch.stack([piece.abs().amax() for piece in pieces]).amax().float().clamp(min=1e-12) / FP8_MAX
    values = torch.empty((num_rows, num_columns), dtype=FP8, device=weight.device)
    for piece, place in zip(pieces, values.split(_ROWS_AT_ONCE), strict=True):
        place.copy_((piece.float() / scale).clamp_(-FP8_MAX, FP8_MAX))
    return RoundedHead(values, values.T.contiguous(), scale)
