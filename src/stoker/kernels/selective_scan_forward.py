"""Kernels of Mamba-1's selective scan (`kernels.selective_scan` has the formulas), forward and between chunks.

A chunk's last state, if it began with zero, is a plain sum over its positions: one launch computes those of all chunks,
one carries the state from chunk to chunk, and a third scans within chunks from the right state. A program holds all
positions of a chunk for some channels and goes through the states of a channel one after the other: nothing of the size
[T, E, N] is ever stored, and a scan runs within a thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stoker.kernels.recurrent import or_empty, sigmoid, softplus
from stoker.kernels.triton_support import contiguous_channels, jit, jit_unspecialized, next_power_of_2, tl

# Positions a chunk and channels a program, two neighbours a thread: then the 32 threads of a warp lie side by side over
# channels, and all positions of a channel are in one thread. (One channel a thread would leave Triton the choice, and
# its version 3.6 spreads time over the threads.)
CHUNK = 16
CHANNELS = 64
NEIGHBOURS = 2
WARPS = 1


@jit
def compose(first_factor: tl.tensor, first_term: tl.tensor, factor: tl.tensor, term: tl.tensor) -> tl.tensor:
    """Two steps h -> factor * h + term as one."""
    return first_factor * factor, first_term * factor + term


@jit
def load_tile(  # noqa: PLR0917
    pointer: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    batch: tl.tensor,
    token: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """Positions and channels [T, E] of a tensor [B, T, E], widened to float32; zeros outside the mask."""
    offset = batch * batch_stride + token[:, None].to(tl.int64) * token_stride + channel[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@jit
def load_row(pointer: tl.tensor, channel: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """A number for each channel [1, E], widened to float32; zeros past the last."""
    return tl.load(pointer + channel, mask=columns, other=0.0).to(tl.float32)[None, :]


@jit
def load_dt(  # noqa: PLR0917
    dt_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    batch: tl.tensor,
    token: tl.tensor,
    channel: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    HAS_BIAS: tl.constexpr,
) -> tl.tensor:
    """dt with its bias [T, E], before softplus."""
    dt = load_tile(dt_ptr, batch_stride, token_stride, batch, token, channel, mask)
    if HAS_BIAS:
        dt += load_row(bias_ptr, channel, columns)
    return dt


@jit
def load_ids(documents_ptr: tl.tensor, batch: tl.tensor, token: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Documents of positions; those before the row's first and after its last are of the nearest one's."""
    return tl.load(documents_ptr + batch * length + tl.minimum(tl.maximum(token, 0), length - 1))


@jit
def chunk_of_program(
    num_chunks: tl.tensor, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, NEIGHBOURS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """(number among all chunks, batch, chunk, positions [T], channels [E]) of this program."""
    program = tl.program_id(1).to(tl.int64)
    batch, chunk = program // num_chunks, (program % num_chunks).to(tl.int32)
    channel = tl.max_contiguous(tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), NEIGHBOURS)
    return program, batch, chunk, chunk * CHUNK + tl.arange(0, CHUNK), channel


@jit_unspecialized("num_chunks")
def _chunk_states_kernel(  # noqa: PLR0917
    values_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    dt_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    A_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    states_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    values_batch: tl.tensor,
    values_token: tl.tensor,
    gate_batch: tl.tensor,
    gate_token: tl.tensor,
    dt_batch: tl.tensor,
    dt_token: tl.tensor,
    length: tl.tensor,
    num_chunks: tl.tensor,
    num_channels: tl.tensor,
    num_states: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
) -> None:
    # Forward, values are x and keys are B: what a chunk adds to the state at its end. Backward, values are dout and
    # keys are C: what it adds to the gradient of the state before it.
    program, batch, chunk, token, channel = chunk_of_program(num_chunks, CHUNK, CHANNELS, NEIGHBOURS)
    columns = channel < num_channels
    mask = (token[:, None] < length) & columns[None, :]
    dt = load_dt(dt_ptr, bias_ptr, dt_batch, dt_token, batch, token, channel, columns, mask, HAS_BIAS)
    # Past the row's end nothing decays and nothing is added.
    step = tl.where(mask, softplus(dt), 0.0)
    values = load_tile(values_ptr, values_batch, values_token, batch, token, channel, mask)
    sums = tl.cumsum(step, axis=0)
    total = tl.sum(step, axis=0)
    if BACKWARD:
        if HAS_GATE:
            gate = load_tile(gate_ptr, gate_batch, gate_token, batch, token, channel, mask)
            values *= gate * sigmoid(gate)
    else:
        values *= step
        sums = total[None, :] - sums
        tl.store(totals_ptr + program * num_channels + channel, total, mask=columns)
    if PACKED:
        edge = chunk * CHUNK - 1 if BACKWARD else chunk * CHUNK + CHUNK - 1
        same = load_ids(documents_ptr, batch, token, length) == load_ids(documents_ptr, batch, edge, length)
        values = tl.where(same[:, None], values, 0.0)
    keys = keys_ptr + batch * num_states * num_chunks * CHUNK + token
    for state_index in range(num_states):
        A = tl.load(A_ptr + state_index * num_channels + channel, mask=columns, other=0.0)
        key = tl.load(keys + state_index * num_chunks * CHUNK)
        state = tl.sum(tl.exp(sums * A[None, :]) * values * key[:, None], axis=0)
        tl.store(states_ptr + (program * num_states + state_index) * num_channels + channel, state, mask=columns)


@jit_unspecialized("num_chunks")
def _carry_kernel(  # noqa: PLR0917
    states_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    A_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    begin_ptr: tl.tensor,
    end_ptr: tl.tensor,
    length: tl.tensor,
    num_chunks: tl.tensor,
    num_channels: tl.tensor,
    size: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    # Replaces what each chunk adds by the state before it (backward: the gradient of the state after it).
    batch = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    channel = element % num_channels
    A = tl.load(A_ptr + element, mask=mask, other=0.0)
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_BEGIN:
        state += tl.load(begin_ptr + batch * size + element, mask=mask, other=0.0)
    for index in tl.range(0, num_chunks, num_stages=STAGES):
        chunk = num_chunks - 1 - index if BACKWARD else index
        place = states_ptr + (batch * num_chunks + chunk) * size + element
        added = tl.load(place, mask=mask, other=0.0)
        total = tl.load(totals_ptr + (batch * num_chunks + chunk) * num_channels + channel, mask=mask, other=0.0)
        across = tl.exp(total * A)
        if PACKED:
            before = load_ids(documents_ptr, batch, chunk * CHUNK - 1, length)
            last = load_ids(documents_ptr, batch, chunk * CHUNK + CHUNK - 1, length)
            across = tl.where(before == last, across, 0.0)
        tl.store(place, state, mask=mask)
        state = across * state + added
    tl.store(end_ptr + batch * size + element, state, mask=mask)


@jit_unspecialized("num_chunks")
def _scan_kernel(  # noqa: PLR0917
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
    out_ptr: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    gate_batch: tl.tensor,
    gate_token: tl.tensor,
    dt_batch: tl.tensor,
    dt_token: tl.tensor,
    length: tl.tensor,
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
) -> None:
    program, batch, _chunk, token, channel = chunk_of_program(num_chunks, CHUNK, CHANNELS, NEIGHBOURS)
    row = tl.arange(0, CHUNK)
    columns, rows = channel < num_channels, token < length
    mask = rows[:, None] & columns[None, :]
    x = load_tile(x_ptr, x_batch, x_token, batch, token, channel, mask)
    dt = load_dt(dt_ptr, bias_ptr, dt_batch, dt_token, batch, token, channel, columns, mask, HAS_BIAS)
    step = tl.where(mask, softplus(dt), 0.0)
    scaled = step * x
    y = tl.zeros((CHUNK, CHANNELS), dtype=tl.float32)
    if HAS_D:
        y += load_row(D_ptr, channel, columns) * x
    carries = rows[:, None]
    if PACKED:
        ids = load_ids(documents_ptr, batch, token, length)
        carries = (ids == load_ids(documents_ptr, batch, token - 1, length))[:, None]
    keys = batch * num_states * num_chunks * CHUNK + token
    for state_index in range(num_states):
        A = tl.load(A_ptr + state_index * num_channels + channel, mask=columns, other=0.0)
        before = tl.load(
            states_ptr + (program * num_states + state_index) * num_channels + channel, mask=columns, other=0.0
        )
        B_n = tl.load(B_ptr + keys + state_index * num_chunks * CHUNK)
        C_n = tl.load(C_ptr + keys + state_index * num_chunks * CHUNK)
        decay = tl.exp(step * A[None, :])
        if PACKED:
            decay = tl.where(carries, decay, 0.0)
        added = scaled * B_n[:, None] + tl.where(row[:, None] == 0, decay * before[None, :], 0.0)
        _, state = tl.associative_scan((decay, added), 0, compose)
        y += state * C_n[:, None]
    if HAS_GATE:
        gate = load_tile(gate_ptr, gate_batch, gate_token, batch, token, channel, mask)
        y *= gate * sigmoid(gate)
    out = (batch * length + token[:, None]) * num_channels + channel[None, :]
    tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=mask)


class Inputs(NamedTuple):
    """The arguments of `selective_scan` as kernels read them.

    Channels are contiguous; A is [N, E], B and C are [B, N, T'] with T' whole chunks, all fp32.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    begin: Tensor | None
    documents: Tensor | None

    @property
    def num_chunks(self) -> int:
        """Chunks a row."""
        return -(-self.x.shape[1] // CHUNK)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length, chunks, channels and states, as kernels take them."""
        return self.x.shape[1], self.num_chunks, self.x.shape[2], self.A.shape[0]

    @property
    def channels(self) -> int:
        """Channels a program."""
        return min(CHANNELS, next_power_of_2(self.x.shape[2]))

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of the kernels that take chunks."""
        return -(-self.x.shape[2] // self.channels), self.x.shape[0] * self.num_chunks

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time values of the kernels that take chunks."""
        return {
            "CHUNK": CHUNK,
            "CHANNELS": self.channels,
            "NEIGHBOURS": NEIGHBOURS,
            "HAS_BIAS": self.dt_bias is not None,
            "HAS_GATE": self.z is not None,
            "PACKED": self.documents is not None,
            "num_warps": WARPS,
        }

    @property
    def gate(self) -> Tensor:
        """The gate, or what a kernel does not read."""
        return or_empty(self.z, self.x)

    @property
    def step_pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt, its bias and A."""
        return self.dt, or_empty(self.dt_bias, self.A), self.A

    @property
    def ids(self) -> Tensor:
        """The documents, or what a kernel does not read."""
        return or_empty(self.documents, self.A)


def inputs_of(  # noqa: PLR0917 - the order of `selective_scan`
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
) -> Inputs:
    """Returns the arguments of `selective_scan` as kernels read them."""
    x, dt = contiguous_channels(x), contiguous_channels(dt)
    D, dt_bias = (None if v is None else v.contiguous() for v in (D, dt_bias))
    return Inputs(
        x,
        dt,
        A.t().float().contiguous(),
        _over_time(B),
        _over_time(C),
        D,
        None if z is None else contiguous_channels(z),
        dt_bias,
        states_first(initial_state),
        documents,
    )


def _over_time(keys: Tensor) -> Tensor:
    """[B, T, N] as [B, N, T'], fp32, zeros past the end: a thread reads the positions of one state at fixed offsets."""
    batch, length, states = keys.shape
    padded = -(-length // CHUNK) * CHUNK
    create = torch.empty if padded == length else torch.zeros
    out = create((batch, states, padded), dtype=torch.float32, device=keys.device)
    out[:, :, :length].copy_(keys.transpose(1, 2))
    return out


def states_first(state: Tensor | None) -> Tensor | None:
    """[B, E, N] as [B, N, E] in fp32, contiguous."""
    return None if state is None else state.transpose(1, 2).float().contiguous()


def launch_states(
    inputs: Inputs, values: Tensor, keys: Tensor, totals: Tensor, begin: Tensor | None, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """The states before (or gradients of those after) each chunk [B, chunks, N, E], and the last [B, E, N]."""
    length, num_chunks, channels, states = inputs.sizes
    batch = inputs.x.shape[0]
    all_states = torch.empty((batch, num_chunks, states, channels), dtype=torch.float32, device=values.device)
    end = torch.empty((batch, states, channels), dtype=torch.float32, device=values.device)
    _chunk_states_kernel[inputs.grid](
        values,
        inputs.gate,
        *inputs.step_pointers,
        keys,
        inputs.ids,
        all_states,
        totals,
        *values.stride()[:2],
        *inputs.gate.stride()[:2],
        *inputs.dt.stride()[:2],
        *inputs.sizes,
        **inputs.constants,
        BACKWARD=backward,
    )
    size = channels * states
    block = min(128, next_power_of_2(size))
    _carry_kernel[(-(-size // block), batch)](
        all_states,
        totals,
        inputs.A,
        inputs.ids,
        or_empty(begin, totals),
        end,
        length,
        num_chunks,
        channels,
        size,
        CHUNK=CHUNK,
        BLOCK=block,
        HAS_BEGIN=begin is not None,
        PACKED=inputs.documents is not None,
        BACKWARD=backward,
        STAGES=4,
        num_warps=1,
    )
    return all_states, end.transpose(1, 2)


def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Returns the outputs [B, T, E], the state after the last position [B, E, N], fp32, and what the backward needs
    besides the inputs: the sum of the step sizes of each chunk and the state before it."""
    x, B, C = inputs.x, inputs.B, inputs.C
    totals = torch.empty((x.shape[0], inputs.num_chunks, x.shape[2]), dtype=torch.float32, device=x.device)
    states, end = launch_states(inputs, x, B, totals, inputs.begin, backward=False)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _scan_kernel[inputs.grid](
        x,
        inputs.gate,
        *inputs.step_pointers,
        B,
        C,
        or_empty(inputs.D, x),
        inputs.ids,
        states,
        out,
        *x.stride()[:2],
        *inputs.gate.stride()[:2],
        *inputs.dt.stride()[:2],
        *inputs.sizes,
        **inputs.constants,
        HAS_D=inputs.D is not None,
    )
    return out, end, (totals, states)
