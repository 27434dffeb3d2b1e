"""Chunked scan of Mamba-2, state-space duality (arXiv:2405.21060, section 6): H heads with a scalar decay each.

    δ_th = clamp(softplus(dt_th + bias_h), limits)
    S_th = exp(δ_th A_h) S_{t−1,h} + δ_th x_th ⊗ B_tg        y_th = S_th C_tg + D_h x_th

x_th has P channels, B and C have N states and are shared by the H / G heads of group g; S is [P, N].

Time is cut into chunks. With c_t the sum of δ A from a chunk's start to t, t included, S the state before the chunk and
c the sum over all of it:

    y_t = Σ_{s≤t} exp(c_t − c_s) (C_t · B_s) δ_s x_s  +  exp(c_t) S C_t  +  D x_t
    S'  = exp(c) S  +  Σ_s exp(c − c_s) δ_s x_s ⊗ B_s

which are matrix products over a chunk. In a packed row a term counts only where its two positions (or its position and
the one before the chunk, or the chunk's last) belong to the same document. No factor exceeds one.

Backward, with G the gradient of S', L_ts = exp(c_t − c_s) and V_ts = δ_s dy_t · x_s:

    gradient of S:  exp(c) G + Σ_t exp(c_t) dy_t ⊗ C_t          (from the last chunk to the first)
    du_s = Σ_t L_ts (C_t · B_s) dy_t + exp(c − c_s) G B_s        dx = δ du + D dy
    dC_t = Σ_h [Σ_s L_ts V_ts B_s + exp(c_t) Sᵀ dy_t]            dB_s = Σ_h [Σ_t L_ts V_ts C_t + exp(c − c_s) Gᵀ u_s]

    Z_ts = L_ts V_ts (C_t · B_s),  r_t = exp(c_t) dy_t · S C_t,  q_s = exp(c − c_s) u_s · G B_s,  u = δ x
    gradient of δ_t A:  Σ_{t' ≥ t} (Σ_s Z_t's − Σ_s Z_st' + r_t' − q_t') + Σ_s q_s + exp(c) ⟨S, G⟩

whence those of δ (with x · du), A, the bias and dt. Saved for backward: the inputs, step sizes with their sums, and the
states between chunks (as large as x times N / 64; a caller short of memory runs all of it again). Products of
half-precision inputs run on tensor cores and are summed in fp32; the states between chunks are kept in the inputs'
dtype, the one that is returned is not rounded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stoker.kernels.chunked_scan_backward import launch_backward
from stoker.kernels.chunked_scan_forward import MAX_CHANNELS, Limits, inputs_of, launch_forward
from stoker.kernels.documents import DocumentLengths, document_ids, same_as_before
from stoker.kernels.triton_support import check_implementation, contiguous_channels

NO_LIMITS: Limits = (0.0, math.inf)

_REFERENCE_CHUNK = 64


def chunked_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limits: Limits = NO_LIMITS,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas in matrix products over chunks; `documents` as `document_ids` gives them.

    The oracle of the implementations below.
    """
    length, heads = x.shape[1:3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    chunk = min(_REFERENCE_CHUNK, max(1, length))
    padding = -length % chunk
    step = _step_sizes(dt, dt_bias, dt_limits, dtype)

    def in_chunks(values: Tensor) -> Tensor:
        """[B, T, ...] as [B, chunks, chunk, ...], zeros past the end: nothing decays there and nothing is added."""
        return F.pad(values, (0, 0) * (values.ndim - 2) + (0, padding)).unflatten(1, (-1, chunk))

    logs = in_chunks(step * A.to(dtype)).cumsum(2)
    u = in_chunks(step.unsqueeze(-1) * x.to(dtype))
    B, C = (in_chunks(v.to(dtype).repeat_interleave(heads // v.shape[2], dim=2)) for v in (B, C))
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril().view(1, 1, chunk, chunk)
    from_start = from_end = None
    if documents is not None:
        ids = F.pad(documents[:, None].float(), (0, padding), mode="replicate")[:, 0]
        from_start = same_as_before(ids, chunk).unflatten(1, (-1, chunk)).unsqueeze(-1)
        ids = ids.unflatten(1, (-1, chunk))
        from_end = (ids == ids[:, :, -1:]).unsqueeze(-1)
        seen = seen & (ids.unsqueeze(3) == ids.unsqueeze(2))
    # Masked before the exponential, which may overflow where s > t, and an infinity times zero is no zero.
    between = (logs.unsqueeze(3) - logs.unsqueeze(2)).masked_fill(~seen.unsqueeze(-1), -math.inf).exp()
    scores = torch.einsum("bcthn,bcshn->bctsh", C, B) * between
    y = torch.einsum("bctsh,bcshp->bcthp", scores, u)

    decay_in = _masked(logs.exp(), from_start)
    decay_out = _masked((logs[:, :, -1:] - logs).exp(), from_end)
    decay = decay_in[:, :, -1]
    additions = torch.einsum("bcthp,bcthn->bchpn", u * decay_out.unsqueeze(-1), B)
    state = additions.new_zeros(additions[:, 0].shape) if initial_state is None else initial_state.to(dtype)
    before = []
    for i in range(additions.shape[1]):
        before.append(state)
        state = decay[:, i, :, None, None] * state + additions[:, i]
    y = y + torch.einsum("bcthn,bchpn->bcthp", C * decay_in.unsqueeze(-1), torch.stack(before, dim=1))
    return _skip(y.flatten(1, 2)[:, :length], x, D), state


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limits: Limits = NO_LIMITS,
    document_lengths: DocumentLengths | None = None,
    initial_state: Tensor | None = None,
    implementation: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Returns the outputs [B, T, H, P] in the dtype of `x` and the state after the last position [B, H, P, N], fp32.

    x: [B, T, H, P]; dt: [B, T, H], before bias, softplus and limits; A: [H], negative; B, C: [B, T, G, N] with H a
    multiple of G; D: [H] or [H, P]; dt_bias: [H]. `document_lengths`: for each row the lengths of its documents; None:
    a row is one document. `initial_state`: [B, H, P, N], which the first document of each row continues. Gradients of
    all tensors. `implementation`: "reference" or "triton"; ValueError for an unknown one, and for lengths that do not
    sum to T.
    """
    documents = document_ids(document_lengths, x.shape[0], x.shape[1], x.device)
    if check_implementation(implementation) and x.numel():
        return _ChunkedScanTriton.apply(x, dt, A, B, C, D, dt_bias, initial_state, documents, dt_limits)
    return chunked_scan_reference(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        dt_limits=dt_limits,
        documents=documents,
        initial_state=initial_state,
    )


def chunked_scan_step(  # noqa: PLR0917 - the order of the other functions
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limits: Limits = NO_LIMITS,
) -> Tensor:
    """Returns the output [B, H, P] of one more position and turns `state` [B, H, P, N] into the one after it, in place.

    The other arguments are those of `chunked_scan` without time; no gradients.
    """
    dtype, heads = state.dtype, x.shape[1]
    step = _step_sizes(dt, dt_bias, dt_limits, dtype)
    B, C = (v.to(dtype).repeat_interleave(heads // v.shape[1], dim=1) for v in (B, C))
    state.mul_((step * A.to(dtype)).exp_()[..., None, None])
    state.addcmul_((step.unsqueeze(-1) * x.to(dtype)).unsqueeze(-1), B.unsqueeze(2))
    return _skip(torch.einsum("bhpn,bhn->bhp", state, C), x, D)


def _step_sizes(dt: Tensor, bias: Tensor | None, limits: Limits, dtype: torch.dtype) -> Tensor:
    step = F.softplus(dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype))
    return step if limits == NO_LIMITS else step.clamp(*limits)


def _masked(factors: Tensor, mask: Tensor | None) -> Tensor:
    return factors if mask is None else factors * mask


def _skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype).view(x.shape[-2], -1) * x.to(y.dtype)
    return y.to(x.dtype)


class _ChunkedScanTriton(torch.autograd.Function):
    """Saves the inputs, the step sizes and the states between chunks."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        documents: Tensor | None,
        limits: Limits,
    ) -> tuple[Tensor, Tensor]:
        """x: [B, T, H, P]; the others as `chunked_scan` has them."""
        if x.shape[3] > MAX_CHANNELS:
            raise ValueError(f"heads of {x.shape[3]} channels; the kernel takes up to {MAX_CHANNELS}. Use 'reference'.")
        inputs = inputs_of(x, dt, A, B, C, D, dt_bias, initial_state, documents, limits)
        out, end, between = launch_forward(inputs)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state, documents, *between)
        ctx.limits = limits
        ctx.set_materialize_grads(False)
        return out, end

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of all tensors; those of A, D and the bias only where one of them is asked for."""
        kept = ctx.saved_tensors  # read once: a checkpoint gives them once
        saved, between = kept[:9], kept[9:]
        grad, grad_end = grads
        if grad is None:
            grad = torch.zeros_like(saved[0])
        needs = ctx.needs_input_grad
        results = launch_backward(
            inputs_of(*saved, ctx.limits),  # pyrefly: ignore[bad-argument-count]
            between,
            contiguous_channels(grad),
            None if grad_end is None else grad_end.contiguous(),
            parameters=needs[2] or needs[5] or needs[6],
        )
        typed = (
            result.to(source.dtype) if need and result is not None else None
            for result, source, need in zip(results, saved[:8], needs[:8], strict=True)
        )
        return (*typed, None, None)
