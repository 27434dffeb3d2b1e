"""Kernels of Mamba-1's selective scan (`kernels.selective_scan` has the formulas), backward.

As forward, from the last chunk to the first. A program's shares of the gradients of B and C (summed over its channels)
and of A, D and the bias (over its positions) are added in a fixed order, without atomics: two runs agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.kernels.recurrent import or_empty, sigmoid, softplus
from stoker.kernels.selective_scan_forward import (
    Inputs,
    chunk_of_program,
    compose,
    launch_states,
    load_dt,
    load_ids,
    load_row,
    load_tile,
    states_first,
)
from stoker.kernels.triton_support import jit, jit_unspecialized, tl


@jit
def _compose_back(  # noqa: PLR0917
    later_decay: tl.tensor,
    later_product: tl.tensor,
    later_grad: tl.tensor,
    decay: tl.tensor,
    product: tl.tensor,
    grad: tl.tensor,
) -> tl.tensor:
    """A stretch of positions and the one after it as one, for gradients, which take the decay of the next position.

    Of each: the decay into its first position, the product of those after that, the gradient of its first state.
    """
    through = product * later_decay
    return decay, through * later_product, through * later_grad + grad


@jit_unspecialized("num_batches", "num_chunks")
def _scan_backward_kernel(  # noqa: PLR0915, PLR0917
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    dt_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    A_ptr: tl.tensor,
    B_ptr: tl.tensor,
    C_ptr: tl.tensor,
    D_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    states_ptr: tl.tensor,
    grad_states_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_gate_ptr: tl.tensor,
    grad_dt_ptr: tl.tensor,
    key_shares_ptr: tl.tensor,
    grad_A_ptr: tl.tensor,
    grad_D_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    grad_batch: tl.tensor,
    grad_token: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    gate_batch: tl.tensor,
    gate_token: tl.tensor,
    dt_batch: tl.tensor,
    dt_token: tl.tensor,
    length: tl.tensor,
    num_batches: tl.tensor,
    num_chunks: tl.tensor,
    num_channels: tl.tensor,
    num_states: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr,
    PARAMETER_GRADS: tl.constexpr,
) -> None:
    program, batch, _chunk, token, channel = chunk_of_program(num_chunks, CHUNK, CHANNELS, NEIGHBOURS)
    block = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, CHUNK)
    columns, rows = channel < num_channels, token < length
    mask = rows[:, None] & columns[None, :]
    dt = load_dt(dt_ptr, bias_ptr, dt_batch, dt_token, batch, token, channel, columns, mask, HAS_BIAS)
    step = tl.where(mask, softplus(dt), 0.0)
    x = load_tile(x_ptr, x_batch, x_token, batch, token, channel, mask)
    grad_y = load_tile(grad_ptr, grad_batch, grad_token, batch, token, channel, mask)
    if HAS_GATE:
        gate = load_tile(gate_ptr, gate_batch, gate_token, batch, token, channel, mask)
        grad_y *= gate * sigmoid(gate)
    scaled = step * x
    y = tl.zeros((CHUNK, CHANNELS), dtype=tl.float32)
    grad_scaled = tl.zeros((CHUNK, CHANNELS), dtype=tl.float32)
    grad_step = tl.zeros((CHUNK, CHANNELS), dtype=tl.float32)
    carries = rows[:, None]
    if PACKED:
        ids = load_ids(documents_ptr, batch, token, length)
        carries = (ids == load_ids(documents_ptr, batch, token - 1, length))[:, None]
    keys = batch * num_states * num_chunks * CHUNK + token
    one = tl.full((CHUNK, CHANNELS), 1.0, dtype=tl.float32)
    every_key = num_batches * num_states * num_chunks * CHUNK
    B_shares = key_shares_ptr + 2 * block * every_key + keys
    C_shares = B_shares + every_key
    for state_index in range(num_states):
        A = tl.load(A_ptr + state_index * num_channels + channel, mask=columns, other=0.0)
        place = (program * num_states + state_index) * num_channels + channel
        before = tl.load(states_ptr + place, mask=columns, other=0.0)
        grad_after = tl.load(grad_states_ptr + place, mask=columns, other=0.0)
        B_n = tl.load(B_ptr + keys + state_index * num_chunks * CHUNK)
        C_n = tl.load(C_ptr + keys + state_index * num_chunks * CHUNK)
        decay = tl.exp(step * A[None, :])
        if PACKED:
            decay = tl.where(carries, decay, 0.0)
        added = scaled * B_n[:, None]
        carried = tl.where(row[:, None] == 0, decay * before[None, :], 0.0)
        _, state = tl.associative_scan((decay, added + carried), 0, compose)
        direct = grad_y * C_n[:, None] + tl.where(row[:, None] == CHUNK - 1, grad_after[None, :], 0.0)
        # Flipped by hand, which within a thread renames registers; `reverse=True` moves every value across the warp.
        backwards = (tl.flip(decay, 0), one, tl.flip(direct, 0))
        _, _, grad_state = tl.associative_scan(backwards, 0, _compose_back)
        grad_state = tl.flip(grad_state, 0)
        y += state * C_n[:, None]
        grad_scaled += grad_state * B_n[:, None]
        through_decay = grad_state * (state - added)
        grad_step += through_decay * A[None, :]
        tl.store(B_shares + state_index * num_chunks * CHUNK, tl.sum(grad_state * scaled, axis=1))
        tl.store(C_shares + state_index * num_chunks * CHUNK, tl.sum(state * grad_y, axis=1))
        if PARAMETER_GRADS:
            tl.store(grad_A_ptr + place, tl.sum(through_decay * step, axis=0), mask=columns)
    # Read again: held across the loop they would cost registers.
    x = load_tile(x_ptr, x_batch, x_token, batch, token, channel, mask)
    dt = load_dt(dt_ptr, bias_ptr, dt_batch, dt_token, batch, token, channel, columns, mask, HAS_BIAS)
    out = (batch * length + token[:, None]) * num_channels + channel[None, :]
    grad_x = grad_scaled * step
    if HAS_D:
        D = load_row(D_ptr, channel, columns)
        y += D * x
        grad_x += D * grad_y
    tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    grad_dt = tl.where(mask, (grad_step + grad_scaled * x) * sigmoid(dt), 0.0)
    tl.store(grad_dt_ptr + out, grad_dt.to(grad_dt_ptr.dtype.element_ty), mask=mask)
    if HAS_GATE:
        gate = load_tile(gate_ptr, gate_batch, gate_token, batch, token, channel, mask)
        grad = load_tile(grad_ptr, grad_batch, grad_token, batch, token, channel, mask)
        open_ = sigmoid(gate)
        grad_gate = grad * y * open_ * (1.0 + gate * (1.0 - open_))
        tl.store(grad_gate_ptr + out, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    if PARAMETER_GRADS:
        place = program * num_channels + channel
        tl.store(grad_D_ptr + place, tl.sum(grad_y * x, axis=0), mask=columns)
        tl.store(grad_bias_ptr + place, tl.sum(grad_dt, axis=0), mask=columns)


def launch_backward(
    inputs: Inputs, between: tuple[Tensor, Tensor], grad: Tensor, grad_end: Tensor | None, *, parameters: bool
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, dt, A, B, C, D, z, the bias and the initial state; A's, D's and the bias' are None
    unless `parameters`. `between`: what `launch_forward` gave for it."""
    x, B, C = inputs.x, inputs.B, inputs.C
    batch, (length, num_chunks, channels, states) = x.shape[0], inputs.sizes
    options = {"dtype": torch.float32, "device": x.device}
    totals, before = between
    after, grad_begin = launch_states(inputs, grad, C, totals, states_first(grad_end), backward=True)
    grad_x, grad_dt = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, inputs.dt))
    grad_z = None if inputs.z is None else torch.empty(x.shape, dtype=inputs.z.dtype, device=x.device)
    key_shares = torch.empty((inputs.grid[0], 2, *B.shape), **options)
    programs = batch * num_chunks
    shares = [torch.empty((programs, *rest, channels), **options) for rest in ((states,), (), ()) if parameters]
    _scan_backward_kernel[inputs.grid](
        grad,
        x,
        inputs.gate,
        *inputs.step_pointers,
        B,
        C,
        or_empty(inputs.D, x),
        inputs.ids,
        before,
        after,
        grad_x,
        or_empty(grad_z, x),
        grad_dt,
        key_shares,
        *(shares or (totals, totals, totals)),
        *grad.stride()[:2],
        *x.stride()[:2],
        *inputs.gate.stride()[:2],
        *inputs.dt.stride()[:2],
        length,
        batch,
        num_chunks,
        channels,
        states,
        **inputs.constants,
        HAS_D=inputs.D is not None,
        PARAMETER_GRADS=parameters,
    )
    grad_B, grad_C = key_shares.sum(0)[..., :length].transpose(2, 3)
    grad_A = grad_D = grad_bias = None
    if parameters:
        grad_A, grad_D, grad_bias = (share.sum(0) for share in shares)
        grad_A = grad_A.t()
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_begin
