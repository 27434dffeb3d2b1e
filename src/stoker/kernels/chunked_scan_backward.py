"""Kernels of Mamba-2's chunked scan (`kernels.chunked_scan` has the formulas), backward.

First the gradients of the states after each chunk, from the last chunk to the first. Then one launch gives what belongs
to a head (x, dt, and shares of A, D and the bias), another what heads share (B and C); shares are added in a fixed
order, without atomics, so that two runs agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.kernels.chunked_scan_forward import STAGES, Inputs, between, decays, launch_states
from stoker.kernels.recurrent import or_empty, sigmoid, softplus, sum_of_parts
from stoker.kernels.triton_support import dot, jit_unspecialized, tl

# Heads whose shares in the gradients of B and C one program adds up.
HEADS_PER_PROGRAM = 12
WARPS = 4


@jit_unspecialized("num_chunks")
def _grad_inputs_kernel(  # noqa: PLR0915, PLR0917
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    dt_ptr: tl.tensor,
    A_ptr: tl.tensor,
    B_ptr: tl.tensor,
    C_ptr: tl.tensor,
    D_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    states_ptr: tl.tensor,
    grad_states_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_dt_ptr: tl.tensor,
    grad_A_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    grad_D_ptr: tl.tensor,
    grad_batch: tl.tensor,
    grad_token: tl.tensor,
    grad_head: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    dt_batch: tl.tensor,
    dt_token: tl.tensor,
    B_batch: tl.tensor,
    B_token: tl.tensor,
    B_group: tl.tensor,
    C_batch: tl.tensor,
    C_token: tl.tensor,
    C_group: tl.tensor,
    length: tl.tensor,
    num_chunks: tl.tensor,
    num_heads: tl.tensor,
    heads_per_group: tl.tensor,
    num_channels: tl.tensor,
    num_states: tl.tensor,
    D_head: tl.tensor,
    D_channel: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    PARAMETER_GRADS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    # Of one chunk and head: the gradients of x and dt, and the shares of those of A, D and the bias.
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // heads_per_group
    inside, channel = tl.arange(0, CHUNK), tl.arange(0, CHANNELS)
    token = (chunk * CHUNK + inside).to(tl.int64)[:, None]
    rows = token < length
    mask = rows & (channel[None, :] < num_channels)
    offset = (batch * num_chunks + chunk) * num_heads + head
    logs, from_start, to_end, across = decays(
        logs_ptr, documents_ptr, offset * CHUNK, batch, chunk, length, CHUNK, PACKED
    )
    steps = tl.load(steps_ptr + offset * CHUNK + inside)
    scores = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    carried = tl.zeros((CHUNK, CHANNELS), dtype=tl.float32)
    carried_grad = tl.zeros((CHUNK, CHANNELS), dtype=tl.float32)
    product = tl.zeros((CHANNELS,), dtype=tl.float32)
    for first in tl.range(0, num_states, STATES, num_stages=STAGES):
        state_index = first + tl.arange(0, STATES)[None, :]
        key_mask = rows & (state_index < num_states)
        B = tl.load(B_ptr + batch * B_batch + token * B_token + group * B_group + state_index, mask=key_mask, other=0.0)
        C = tl.load(C_ptr + batch * C_batch + token * C_token + group * C_group + state_index, mask=key_mask, other=0.0)
        tile = (offset * num_channels + channel[:, None]) * num_states + state_index
        tile_mask = (channel[:, None] < num_channels) & (state_index < num_states)
        state = tl.load(states_ptr + tile, mask=tile_mask, other=0.0)
        grad_state = tl.load(grad_states_ptr + tile, mask=tile_mask, other=0.0)
        scores += dot(C, tl.trans(B))
        carried += dot(C, tl.trans(state))
        carried_grad += dot(B, tl.trans(grad_state))
        product += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), axis=1)
    scores *= between(logs, documents_ptr, batch, chunk * CHUNK, length, CHUNK, PACKED)
    x = tl.load(x_ptr + batch * x_batch + token * x_token + head * x_head + channel[None, :], mask=mask, other=0.0)
    grad = tl.load(
        grad_ptr + batch * grad_batch + token * grad_token + head * grad_head + channel[None, :], mask=mask, other=0.0
    )
    wide_x, wide_grad = x.to(tl.float32), grad.to(tl.float32)
    through = scores * dot(grad, tl.trans(x)) * steps[None, :]
    grad_u = dot(tl.trans(scores.to(grad.dtype)), grad) + carried_grad * to_end[:, None]
    added = to_end * steps * tl.sum(wide_x * carried_grad, axis=1)
    read = from_start * tl.sum(wide_grad * carried, axis=1)
    # Rows and columns are summed from the same numbers: what lies after t in both cancels exactly.
    grad_logs = tl.sum(through, axis=1) - tl.sum(through, axis=0) + read - added
    grad_decay = tl.cumsum(grad_logs, axis=0, reverse=True) + (tl.sum(added, axis=0) + across * tl.sum(product, axis=0))

    A = tl.load(A_ptr + head).to(tl.float32)
    grad_steps = grad_decay * A + tl.sum(wide_x * grad_u, axis=1)
    position = chunk * CHUNK + inside
    dt = tl.load(dt_ptr + batch * dt_batch + position.to(tl.int64) * dt_token + head, mask=position < length, other=0.0)
    dt = dt.to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + head).to(tl.float32)
    plain = softplus(dt)
    grad_dt = tl.where((plain >= lowest) & (plain <= highest), grad_steps * sigmoid(dt), 0.0)
    grad_dt = tl.where(position < length, grad_dt, 0.0)
    out = (batch * length + position) * num_heads + head
    tl.store(grad_dt_ptr + out, grad_dt.to(grad_dt_ptr.dtype.element_ty), mask=position < length)
    grad_x = grad_u * steps[:, None]
    if HAS_D:
        D = tl.load(D_ptr + head * D_head + channel * D_channel, mask=channel < num_channels, other=0.0)
        grad_x += wide_grad * D.to(tl.float32)[None, :]
    out = ((batch * length + token) * num_heads + head) * num_channels + channel[None, :]
    tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if PARAMETER_GRADS:
        tl.store(grad_A_ptr + offset, tl.sum(grad_decay * steps, axis=0))
        tl.store(grad_bias_ptr + offset, tl.sum(grad_dt, axis=0))
        share = tl.sum(wide_grad * wide_x, axis=0)
        tl.store(grad_D_ptr + offset * num_channels + channel, share, mask=channel < num_channels)


@jit_unspecialized("num_batches", "num_chunks")
def _grad_shared_kernel(  # noqa: PLR0917
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    B_ptr: tl.tensor,
    C_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    states_ptr: tl.tensor,
    grad_states_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    grad_batch: tl.tensor,
    grad_token: tl.tensor,
    grad_head: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    B_batch: tl.tensor,
    B_token: tl.tensor,
    B_group: tl.tensor,
    C_batch: tl.tensor,
    C_token: tl.tensor,
    C_group: tl.tensor,
    length: tl.tensor,
    num_chunks: tl.tensor,
    num_batches: tl.tensor,
    num_heads: tl.tensor,
    num_groups: tl.tensor,
    heads_per_group: tl.tensor,
    heads_per_program: tl.tensor,
    num_channels: tl.tensor,
    num_states: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    # Of one chunk, a group's share of heads and a share of the states: the gradients of B and C. What heads have in
    # common is multiplied once: the sum of L * V over heads by B and C.
    blocks = tl.cdiv(num_states, STATES)
    parts = tl.cdiv(heads_per_group, heads_per_program)
    program = tl.program_id(0)
    block, share = program % blocks, program // blocks
    part, group = (share % parts).to(tl.int64), (share // parts).to(tl.int64)
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside, channel = tl.arange(0, CHUNK), tl.arange(0, CHANNELS)
    state_index = (block * STATES + tl.arange(0, STATES))[None, :]
    token = (chunk * CHUNK + inside).to(tl.int64)[:, None]
    rows = token < length
    mask = rows & (channel[None, :] < num_channels)
    tile = channel[:, None] * num_states + state_index
    tile_mask = (channel[:, None] < num_channels) & (state_index < num_states)
    grad_scores = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    grad_B = tl.zeros((CHUNK, STATES), dtype=tl.float32)
    grad_C = tl.zeros((CHUNK, STATES), dtype=tl.float32)
    first_head = group * heads_per_group + part * heads_per_program
    last_head = tl.minimum(first_head + heads_per_program, (group + 1) * heads_per_group)
    for head in tl.range(first_head, last_head, num_stages=STAGES):
        offset = (batch * num_chunks + chunk) * num_heads + head
        logs, from_start, to_end, _ = decays(
            logs_ptr, documents_ptr, offset * CHUNK, batch, chunk, length, CHUNK, PACKED
        )
        steps = tl.load(steps_ptr + offset * CHUNK + inside)
        x = tl.load(x_ptr + batch * x_batch + token * x_token + head * x_head + channel[None, :], mask=mask, other=0.0)
        grad = tl.load(
            grad_ptr + batch * grad_batch + token * grad_token + head * grad_head + channel[None, :],
            mask=mask,
            other=0.0,
        )
        state = tl.load(states_ptr + offset * num_channels * num_states + tile, mask=tile_mask, other=0.0)
        grad_state = tl.load(grad_states_ptr + offset * num_channels * num_states + tile, mask=tile_mask, other=0.0)
        decay = between(logs, documents_ptr, batch, chunk * CHUNK, length, CHUNK, PACKED)
        grad_scores += dot(grad, tl.trans(x)) * decay * steps[None, :]
        grad_C += dot((grad.to(tl.float32) * from_start[:, None]).to(state.dtype), state)
        grad_B += dot((x.to(tl.float32) * (to_end * steps)[:, None]).to(state.dtype), grad_state)
    key_mask = rows & (state_index < num_states)
    B = tl.load(B_ptr + batch * B_batch + token * B_token + group * B_group + state_index, mask=key_mask, other=0.0)
    C = tl.load(C_ptr + batch * C_batch + token * C_token + group * C_group + state_index, mask=key_mask, other=0.0)
    scores = grad_scores.to(B.dtype)
    grad_C += dot(scores, B)
    grad_B += dot(tl.trans(scores), C)
    row_B = (2 * part * num_batches + batch) * length + token
    row_C = ((2 * part + 1) * num_batches + batch) * length + token
    tl.store(shares_ptr + (row_B * num_groups + group) * num_states + state_index, grad_B, mask=key_mask)
    tl.store(shares_ptr + (row_C * num_groups + group) * num_states + state_index, grad_C, mask=key_mask)


def launch_backward(
    inputs: Inputs,
    between: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    grad_end: Tensor | None,
    *,
    parameters: bool,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, dt, A, B, C, D, the bias and the initial state; A's, D's and the bias' are None
    unless `parameters`. `between`: what `launch_forward` gave for it."""
    x, B, C = inputs.x, inputs.B, inputs.C
    steps, logs, states = between
    grad_states, grad_begin = launch_states(inputs, grad, C, steps, logs, grad_end, backward=True)
    grad_x, grad_dt = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, inputs.dt))
    batch, _, heads, channels = x.shape
    programs = batch * inputs.num_chunks
    options = {"dtype": torch.float32, "device": x.device}
    shares = [torch.empty((programs, heads, *rest), **options) for rest in ((), (), (channels,)) if parameters]
    _grad_inputs_kernel[(heads, inputs.num_chunks, batch)](
        grad,
        x,
        inputs.dt,
        inputs.A,
        B,
        C,
        or_empty(inputs.D, x),
        or_empty(inputs.dt_bias, x),
        steps,
        logs,
        inputs.ids,
        states,
        grad_states,
        grad_x,
        grad_dt,
        *(shares or (logs, logs, logs)),
        *grad.stride()[:3],
        *x.stride()[:3],
        *inputs.dt.stride()[:2],
        *B.stride()[:3],
        *C.stride()[:3],
        *inputs.sizes,
        *inputs.skip_strides,
        *(float(limit) for limit in inputs.limits),
        **inputs.tiles,
        HAS_D=inputs.D is not None,
        HAS_BIAS=inputs.dt_bias is not None,
        PARAMETER_GRADS=parameters,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    grad_B, grad_C = _launch_grad_shared(inputs, grad, steps, logs, states, grad_states)
    grad_A = grad_bias = grad_D = None
    if parameters:
        grad_A, grad_bias, grad_D = (share.sum(0) for share in shares)
        if inputs.D is not None and inputs.D.ndim == 1:
            grad_D = grad_D.sum(1)
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_begin


def _launch_grad_shared(  # noqa: PLR0917
    inputs: Inputs, grad: Tensor, steps: Tensor, logs: Tensor, states: Tensor, grad_states: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of B and C; programs that share heads of a group each write a part, added in a fixed order."""
    x, B, C = inputs.x, inputs.B, inputs.C
    tiles, (length, num_chunks, heads, heads_per_group, channels, num_states) = inputs.tiles, inputs.sizes
    heads_per_program = min(HEADS_PER_PROGRAM, heads_per_group)
    parts = -(-heads_per_group // heads_per_program)
    groups = B.shape[2]
    shares = torch.empty((parts, 2, *B.shape), dtype=torch.float32, device=B.device)
    _grad_shared_kernel[(-(-num_states // tiles["STATES"]) * parts * groups, num_chunks, x.shape[0])](
        grad,
        x,
        B,
        C,
        steps,
        logs,
        inputs.ids,
        states,
        grad_states,
        shares,
        *grad.stride()[:3],
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        length,
        num_chunks,
        x.shape[0],
        heads,
        groups,
        heads_per_group,
        heads_per_program,
        channels,
        num_states,
        **tiles,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    grad_B, grad_C = sum_of_parts(shares, shares.shape[1:], B.dtype)
    return grad_B, grad_C
