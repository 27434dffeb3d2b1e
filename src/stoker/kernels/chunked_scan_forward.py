"""Kernels of Mamba-2's chunked scan (`kernels.chunked_scan` has the formulas), forward.

Three launches: step sizes and decays; the state before each chunk, one after the other; the outputs of all at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from stoker.kernels.recurrent import or_empty, softplus
from stoker.kernels.triton_support import contiguous_channels, dot, jit, jit_unspecialized, next_power_of_2, tl

Limits = tuple[float, float]

# Positions a chunk and states a tile: 64 rows fill a tensor core's instruction, and what two products of a chunk read
# fits 64 KB. Half of either where numbers are wider, or where products run without tensor cores (before sm_80).
MAX_CHUNK = 64
MAX_STATES = 64
MAX_CHANNELS = 128
WARPS = 4
STAGES = 3


@jit
def decays(  # noqa: PLR0917
    logs_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    offset: tl.tensor,
    batch: tl.tensor,
    chunk: tl.tensor,
    length: tl.tensor,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """Returns c_t, exp(c_t), exp(c - c_t) and exp(c) of one chunk and head; zeros where a document ends in between."""
    inside = tl.arange(0, CHUNK)
    logs = tl.load(logs_ptr + offset + inside)
    total = tl.load(logs_ptr + offset + CHUNK - 1)
    from_start, to_end, across = tl.exp(logs), tl.exp(total - logs), tl.exp(total)
    if PACKED:
        row = documents_ptr + batch * length
        first = chunk * CHUNK
        before = tl.load(row + tl.maximum(first - 1, 0))
        last = tl.load(row + tl.minimum(first + CHUNK, length) - 1)
        ids = tl.load(row + first + inside, mask=first + inside < length, other=-1)
        from_start = tl.where(ids == before, from_start, 0.0)
        to_end = tl.where(ids == last, to_end, 0.0)
        across = tl.where(before == last, across, 0.0)
    return logs, from_start, to_end, across


@jit
def between(  # noqa: PLR0917
    logs: tl.tensor,
    documents_ptr: tl.tensor,
    batch: tl.tensor,
    first: tl.tensor,
    length: tl.tensor,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """Returns L [t, s] of one chunk and head: exp(c_t - c_s) where s <= t in the same document, else 0."""
    inside = tl.arange(0, CHUNK)
    seen = inside[:, None] >= inside[None, :]
    if PACKED:
        ids = tl.load(documents_ptr + batch * length + first + inside, mask=first + inside < length, other=-1)
        seen = seen & (ids[:, None] == ids[None, :])
    # Masked before the exponential: where s > t it may overflow.
    return tl.exp(tl.where(seen, logs[:, None] - logs[None, :], float("-inf")))


@jit_unspecialized("num_chunks")
def _steps_kernel(  # noqa: PLR0917
    dt_ptr: tl.tensor,
    A_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    dt_batch: tl.tensor,
    dt_token: tl.tensor,
    length: tl.tensor,
    num_chunks: tl.tensor,
    num_heads: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    batch, chunk = program // num_chunks, program % num_chunks
    inside = tl.arange(0, CHUNK)
    token = chunk * CHUNK + inside
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask = (token[:, None] < length) & (head[None, :] < num_heads)
    dt = tl.load(dt_ptr + batch * dt_batch + token[:, None] * dt_token + head[None, :], mask=mask, other=0.0)
    dt = dt.to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + head, mask=head < num_heads, other=0.0).to(tl.float32)[None, :]
    steps = tl.minimum(tl.maximum(softplus(dt), lowest), highest)
    # Past the row's end nothing decays and nothing is added.
    steps = tl.where(mask, steps, 0.0)
    A = tl.load(A_ptr + head, mask=head < num_heads, other=0.0).to(tl.float32)
    logs = tl.cumsum(steps * A[None, :], axis=0)
    out = (program * num_heads + head[None, :]) * CHUNK + inside[:, None]
    tl.store(steps_ptr + out, steps, mask=head[None, :] < num_heads)
    tl.store(logs_ptr + out, logs, mask=head[None, :] < num_heads)


@jit_unspecialized("num_chunks")
def _states_kernel(  # noqa: PLR0917
    values_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    begin_ptr: tl.tensor,
    states_ptr: tl.tensor,
    end_ptr: tl.tensor,
    values_batch: tl.tensor,
    values_token: tl.tensor,
    values_head: tl.tensor,
    keys_batch: tl.tensor,
    keys_token: tl.tensor,
    keys_group: tl.tensor,
    length: tl.tensor,
    num_chunks: tl.tensor,
    num_heads: tl.tensor,
    heads_per_group: tl.tensor,
    num_channels: tl.tensor,
    num_states: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    # Forward, values are x and keys are B: stores the state before each chunk. Backward, values are dy and keys are C:
    # from the last chunk to the first, stores the gradient of the state after each.
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, CHUNK)
    channel = tl.arange(0, CHANNELS)
    state_index = tl.program_id(0) * STATES + tl.arange(0, STATES)
    tile = channel[:, None] * num_states + state_index[None, :]
    tile_mask = (channel[:, None] < num_channels) & (state_index[None, :] < num_states)
    size = num_channels * num_states
    values = values_ptr + batch * values_batch + head * values_head + channel[None, :]
    keys = keys_ptr + batch * keys_batch + (head // heads_per_group) * keys_group + state_index[None, :]
    state = tl.zeros((CHANNELS, STATES), dtype=tl.float32)
    if HAS_BEGIN:
        state += tl.load(begin_ptr + (batch * num_heads + head) * size + tile, mask=tile_mask, other=0.0).to(tl.float32)
    for index in tl.range(0, num_chunks, num_stages=STAGES):
        chunk = num_chunks - 1 - index if BACKWARD else index
        offset = (batch * num_chunks + chunk) * num_heads + head
        tl.store(states_ptr + offset * size + tile, state.to(states_ptr.dtype.element_ty), mask=tile_mask)
        _, from_start, to_end, across = decays(
            logs_ptr, documents_ptr, offset * CHUNK, batch, chunk, length, CHUNK, PACKED
        )
        weight = from_start if BACKWARD else to_end * tl.load(steps_ptr + offset * CHUNK + inside)
        token = (chunk * CHUNK + inside).to(tl.int64)[:, None]
        rows = token < length
        value = tl.load(values + token * values_token, mask=rows & (channel[None, :] < num_channels), other=0.0)
        key = tl.load(keys + token * keys_token, mask=rows & (state_index[None, :] < num_states), other=0.0)
        weighted = (value.to(tl.float32) * weight[:, None]).to(key.dtype)
        state = state * across + dot(tl.trans(weighted), key)
    tl.store(end_ptr + (batch * num_heads + head) * size + tile, state, mask=tile_mask)


@jit_unspecialized("num_chunks")
def _output_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    B_ptr: tl.tensor,
    C_ptr: tl.tensor,
    D_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    states_ptr: tl.tensor,
    out_ptr: tl.tensor,
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
    num_heads: tl.tensor,
    heads_per_group: tl.tensor,
    num_channels: tl.tensor,
    num_states: tl.tensor,
    D_head: tl.tensor,
    D_channel: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    # Heads fastest: programs that share B and C run at the same time.
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // heads_per_group
    inside, channel = tl.arange(0, CHUNK), tl.arange(0, CHANNELS)
    token = (chunk * CHUNK + inside).to(tl.int64)[:, None]
    rows = token < length
    columns = channel[None, :] < num_channels
    offset = (batch * num_chunks + chunk) * num_heads + head
    logs, from_start, _, _ = decays(logs_ptr, documents_ptr, offset * CHUNK, batch, chunk, length, CHUNK, PACKED)
    steps = tl.load(steps_ptr + offset * CHUNK + inside)
    scores = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    carried = tl.zeros((CHUNK, CHANNELS), dtype=tl.float32)
    for first in tl.range(0, num_states, STATES, num_stages=STAGES):
        state_index = first + tl.arange(0, STATES)[None, :]
        mask = rows & (state_index < num_states)
        B = tl.load(B_ptr + batch * B_batch + token * B_token + group * B_group + state_index, mask=mask, other=0.0)
        C = tl.load(C_ptr + batch * C_batch + token * C_token + group * C_group + state_index, mask=mask, other=0.0)
        state = tl.load(
            states_ptr + (offset * num_channels + channel[:, None]) * num_states + state_index,
            mask=(channel[:, None] < num_channels) & (state_index < num_states),
            other=0.0,
        )
        scores += dot(C, tl.trans(B))
        carried += dot(C, tl.trans(state))
    scores *= between(logs, documents_ptr, batch, chunk * CHUNK, length, CHUNK, PACKED) * steps[None, :]
    x = tl.load(
        x_ptr + batch * x_batch + token * x_token + head * x_head + channel[None, :], mask=rows & columns, other=0.0
    )
    y = dot(scores.to(x.dtype), x) + carried * from_start[:, None]
    if HAS_D:
        D = tl.load(D_ptr + head * D_head + channel * D_channel, mask=channel < num_channels, other=0.0)
        y += x.to(tl.float32) * D.to(tl.float32)[None, :]
    out = out_ptr + ((batch * length + token) * num_heads + head) * num_channels + channel[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=rows & columns)


@lru_cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies half precision on tensor cores there (and for the interpreter, as if so)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True)
class Inputs:
    """The arguments of `chunked_scan` with contiguous channels, and the tiles that fit them."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    documents: Tensor | None
    limits: Limits

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Positions a chunk and states a tile at most."""
        on_tensor_cores = self.x.element_size() <= 2 and _has_tensor_cores(self.x.device)
        return (MAX_CHUNK, MAX_STATES) if on_tensor_cores else (MAX_CHUNK // 2, MAX_STATES // 2)

    @cached_property
    def chunk(self) -> int:
        """Positions a chunk."""
        return max(16, min(self.largest[0], next_power_of_2(self.x.shape[1])))

    @cached_property
    def num_chunks(self) -> int:
        """Chunks a row."""
        return -(-self.x.shape[1] // self.chunk)

    @cached_property
    def tiles(self) -> dict[str, Any]:
        """Compile-time sizes that all kernels but the first share."""
        channels, states = self.x.shape[3], self.B.shape[3]
        return {
            "CHUNK": self.chunk,
            "CHANNELS": max(16, next_power_of_2(channels)),
            "STATES": max(16, min(self.largest[1], next_power_of_2(states))),
            "PACKED": self.documents is not None,
        }

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Length, chunks, heads, heads a group, channels and states, as kernels take them."""
        heads = self.x.shape[2]
        return self.x.shape[1], self.num_chunks, heads, heads // self.B.shape[2], self.x.shape[3], self.B.shape[3]

    @cached_property
    def ids(self) -> Tensor:
        """The documents, or what a kernel does not read."""
        return or_empty(self.documents, self.dt)

    @cached_property
    def skip_strides(self) -> tuple[int, int]:
        """From head to head and from channel to channel."""
        return (0, 0) if self.D is None else (self.D.stride(0), self.D.stride(1) if self.D.ndim == 2 else 0)


def inputs_of(  # noqa: PLR0917 - the order of `chunked_scan`
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
) -> Inputs:
    """Returns the arguments of `chunked_scan` as kernels read them."""
    return Inputs(
        contiguous_channels(x),
        contiguous_channels(dt),
        A.contiguous(),
        contiguous_channels(B.to(x.dtype)),
        contiguous_channels(C.to(x.dtype)),
        D,
        None if dt_bias is None else dt_bias.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        documents,
        limits,
    )


def launch_steps(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns step sizes and their cumulated decays, fp32 [B, chunks, H, chunk]."""
    dt, batch, heads = inputs.dt, inputs.x.shape[0], inputs.x.shape[2]
    steps = torch.empty((batch, inputs.num_chunks, heads, inputs.chunk), dtype=torch.float32, device=dt.device)
    logs = torch.empty_like(steps)
    block = min(16, next_power_of_2(heads))
    _steps_kernel[(batch * inputs.num_chunks, -(-heads // block))](
        dt,
        inputs.A,
        or_empty(inputs.dt_bias, dt),
        steps,
        logs,
        *dt.stride()[:2],
        *inputs.sizes[:3],
        *(float(limit) for limit in inputs.limits),
        CHUNK=inputs.chunk,
        HEADS=block,
        HAS_BIAS=inputs.dt_bias is not None,
        num_warps=4,
    )
    return steps, logs


def launch_states(  # noqa: PLR0917
    inputs: Inputs,
    values: Tensor,
    keys: Tensor,
    steps: Tensor,
    logs: Tensor,
    begin: Tensor | None,
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the states before (or gradients of those after) each chunk [B, chunks, H, P, N], and the last, fp32."""
    batch, _, heads, channels = values.shape
    states = keys.shape[3]
    all_states = keys.new_empty(batch, inputs.num_chunks, heads, channels, states)
    end = torch.empty((batch, heads, channels, states), dtype=torch.float32, device=keys.device)
    tiles = inputs.tiles
    _states_kernel[(-(-states // tiles["STATES"]), heads, batch)](
        values,
        keys,
        steps,
        logs,
        inputs.ids,
        or_empty(begin, logs),
        all_states,
        end,
        *values.stride()[:3],
        *keys.stride()[:3],
        *inputs.sizes,
        **tiles,
        HAS_BEGIN=begin is not None,
        BACKWARD=backward,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return all_states, end


def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Returns the outputs [B, T, H, P], the state after the last position, and what the backward needs besides the
    inputs: step sizes, their cumulated decays, the state before each chunk."""
    x = inputs.x
    steps, logs = launch_steps(inputs)
    states, end = launch_states(inputs, x, inputs.B, steps, logs, inputs.initial_state, backward=False)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _output_kernel[(x.shape[2], inputs.num_chunks, x.shape[0])](
        x,
        inputs.B,
        inputs.C,
        or_empty(inputs.D, x),
        steps,
        logs,
        inputs.ids,
        states,
        out,
        *x.stride()[:3],
        *inputs.B.stride()[:3],
        *inputs.C.stride()[:3],
        *inputs.sizes,
        *inputs.skip_strides,
        **inputs.tiles,
        HAS_D=inputs.D is not None,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return out, end, (steps, logs, states)
