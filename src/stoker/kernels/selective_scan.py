"""Selective scan of Mamba-1 (arXiv:2312.00752): E channels with N states each, parameters that vary with time.

    δ_te = softplus(dt_te + bias_e)
    h_ten = a_ten h_{t−1,en} + δ_te B_tn x_te         a_ten = exp(δ_te A_en)
    y_te = Σ_n C_tn h_ten + D_e x_te                  out = y, or y · silu(z)

In a packed row the state is zero before each document's first position, which is a_ten = 0 there.

Time is cut into chunks. With s the sum of δ from a chunk's start to t, the state at t is that of a scan from zero plus
exp(s A) times the state before the chunk; so chunks are scanned side by side, and only their last states follow one
another. No factor exceeds one, whatever δ.

Backward, with dy = dout · silu(z), g the gradient of h_t and b_ten = δ_te B_tn x_te:

    g_ten = C_tn dy_te + a_{t+1,en} g_{t+1,en}               dz = dout · y · σ(z) (1 + z (1 − σ(z)))
    dB_tn = Σ_e g_ten δ_te x_te        dC_tn = Σ_e h_ten dy_te        dx = δ Σ_n g B + D dy
    dδ_te = Σ_n g_ten (x_te B_tn + A_en (h_ten − b_ten))     dA_en = Σ_t g_ten δ_te (h_ten − b_ten)

Saved for backward: the inputs and the states between chunks (as large as x times N / 16 in fp32; a caller short of
memory runs all of it again). States within a chunk are computed again and never leave the registers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stoker.kernels.documents import DocumentLengths, document_ids, starts
from stoker.kernels.selective_scan_backward import launch_backward
from stoker.kernels.selective_scan_forward import Inputs, inputs_of, launch_forward
from stoker.kernels.triton_support import check_implementation, contiguous_channels


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks of about √T positions, all at once, position by position; then their states, one chunk after the other.

    `documents` as `document_ids` gives them. The oracle of the implementations below.
    """
    batch, length, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    chunk = max(1, math.isqrt(length))
    count = -(-length // chunk)
    step = _step_sizes(dt, dt_bias, dtype)
    decays = (step.unsqueeze(-1) * A.to(dtype)).exp()
    additions = (step * x.to(dtype)).unsqueeze(-1) * B.to(dtype).unsqueeze(2)
    if documents is not None:
        decays = decays * ~starts(documents)[:, :, None, None]
    # Past the end nothing decays and nothing is added, so that the last state is that of the last position.
    padding = count * chunk - length
    decays = F.pad(decays, (0, 0, 0, 0, 0, padding), value=1.0).unflatten(1, (count, chunk))
    additions = F.pad(additions, (0, 0, 0, 0, 0, padding)).unflatten(1, (count, chunk))
    local, total = [additions[:, :, 0]], [decays[:, :, 0]]
    for i in range(1, chunk):
        local.append(decays[:, :, i] * local[-1] + additions[:, :, i])
        total.append(decays[:, :, i] * total[-1])
    state = x.new_zeros(batch, channels, A.shape[1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    before = []
    for i in range(count):
        before.append(state)
        state = total[-1][:, i] * state + local[-1][:, i]
    states = torch.stack(local, dim=2) + torch.stack(total, dim=2) * torch.stack(before, dim=1).unsqueeze(2)
    states = states.flatten(1, 2)[:, :length]
    y = torch.einsum("bten,btn->bte", states, C.to(dtype))
    return _skip_and_gate(y, x, D, z), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    document_lengths: DocumentLengths | None = None,
    initial_state: Tensor | None = None,
    implementation: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Returns the outputs [B, T, E] in the dtype of `x` and the state after the last position [B, E, N], fp32.

    x: [B, T, E]; dt: [B, T, E], before bias and softplus; A: [E, N], negative; B, C: [B, T, N]; D: [E]; z: [B, T, E],
    the gate before its SiLU; dt_bias: [E]. `document_lengths`: for each row the lengths of its documents; None: a row
    is one document. `initial_state`: [B, E, N], which the first document of each row continues. Gradients of all
    tensors. `implementation`: "reference" or "triton"; ValueError for an unknown one, and for lengths that do not sum
    to T.
    """
    documents = document_ids(document_lengths, x.shape[0], x.shape[1], x.device)
    if check_implementation(implementation) and x.numel():
        return _SelectiveScanTriton.apply(x, dt, A, B, C, D, z, dt_bias, initial_state, documents)
    return selective_scan_reference(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, documents=documents, initial_state=initial_state
    )


def selective_scan_step(  # noqa: PLR0917 - the order of the other functions
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """Returns the output [B, E] of one more position and turns `state` [B, E, N] into the one after it, in place.

    The other arguments are those of `selective_scan` without time; no gradients.
    """
    dtype = state.dtype
    step = _step_sizes(dt, dt_bias, dtype)
    state.mul_((step.unsqueeze(-1) * A.to(dtype)).exp_())
    state.add_((step * x.to(dtype)).unsqueeze(-1) * B.to(dtype).unsqueeze(1))
    y = torch.einsum("ben,bn->be", state, C.to(dtype))
    return _skip_and_gate(y, x, D, z)


def _step_sizes(dt: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.softplus(dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype))


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(x.dtype)


class _SelectiveScanTriton(torch.autograd.Function):
    """Saves the inputs and the states between chunks."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x: [B, T, E]; the others as `selective_scan` has them."""
        inputs = inputs_of(x, dt, A, B, C, D, z, dt_bias, initial_state, documents)
        out, end, between = launch_forward(inputs)
        ctx.save_for_backward(*inputs, *between)
        ctx.dtypes = [None if v is None else v.dtype for v in (x, dt, A, B, C, D, z, dt_bias, initial_state)]
        ctx.set_materialize_grads(False)
        return out, end

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of all tensors; those of A, D and the bias only where one of them is asked for."""
        kept = ctx.saved_tensors  # read once: a checkpoint gives them once
        inputs = Inputs(*kept[:10])
        grad, grad_end = grads
        if grad is None:
            grad = torch.zeros_like(inputs.x)
        needs = ctx.needs_input_grad
        results = launch_backward(
            inputs,
            kept[10:],
            contiguous_channels(grad),
            grad_end,
            parameters=needs[2] or needs[5] or needs[7],
        )
        typed = (
            result.to(dtype) if need and result is not None else None
            for result, dtype, need in zip(results, ctx.dtypes, needs[:9], strict=True)
        )
        return (*typed, None)
