"""Causal depthwise convolution over time of width W, channels last: the short convolution of Mamba (arXiv:2312.00752).

    v_tc = b_c + Σ_k w_ck · x_{t−W+1+k, c}        y = v, or v · σ(v) (SiLU)

    dv = dy, or dy · σ(v) (1 + v (1 − σ(v)))
    dx_sc = Σ_k w_ck · dv_{s+W−1−k, c}            dw_ck = Σ_t dv_tc · x_{t−W+1+k, c}        db_c = Σ_t dv_tc

Terms whose two positions lie in different documents, or before the row's first position, are left out. Saved for
backward: the inputs alone. Sums are fp32 whatever the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stoker.kernels.documents import DocumentLengths, document_ids
from stoker.kernels.recurrent import or_empty, sigmoid
from stoker.kernels.triton_support import check_implementation, contiguous_channels, jit, next_power_of_2, tl

# Positions a program, and channels forward and backward: 16 or 8 values a thread, which reads 16 bytes at once. For
# 8,192 x 3,328 values in bf16 an H200 takes 50 us forward (75 with 64 channels) and 155 backward (192 with 128).
ROWS = 16
FORWARD_CHANNELS = 128
BACKWARD_CHANNELS = 64
WARPS = 4


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
    if check_implementation(implementation) and x.numel():
        return _CausalConvTriton.apply(x, weight, bias, silu, documents)
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


@jit
def _load_rows(  # noqa: PLR0917
    pointer: tl.tensor,
    documents_ptr: tl.tensor,
    token: tl.tensor,
    reader: tl.tensor,
    token_stride: tl.tensor,
    channel: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """Positions [ROWS, CHANNELS] of one row, widened; zeros outside it and where `reader` is of another document."""
    rows = (token >= 0) & (token < length)
    if PACKED:
        own = tl.load(documents_ptr + token, mask=rows, other=-1)
        rows = rows & (own == tl.load(documents_ptr + reader, mask=(reader >= 0) & (reader < length), other=-2))
    mask = rows[:, None] & (channel[None, :] < num_channels)
    return tl.load(pointer + token[:, None].to(tl.int64) * token_stride + channel[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@jit
def _preactivation(  # noqa: PLR0917
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    token: tl.tensor,
    x_token: tl.tensor,
    channel: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """v of the positions `token` of one row."""
    columns = channel < num_channels
    v = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + channel, mask=columns, other=0.0).to(tl.float32)[None, :]
    for distance in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + channel * WIDTH + (WIDTH - 1 - distance), mask=columns, other=0.0).to(tl.float32)
        x = _load_rows(x_ptr, documents_ptr, token - distance, token, x_token, channel, length, num_channels, PACKED)
        v += tap[None, :] * x
    return v


@jit
def _forward_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    v = _preactivation(
        x_ptr + batch * x_batch,
        weight_ptr,
        bias_ptr,
        documents_ptr + batch * length,
        token,
        x_token,
        channel,
        length,
        num_channels,
        ROWS,
        CHANNELS,
        WIDTH,
        HAS_BIAS,
        PACKED,
    )
    if SILU:
        v *= sigmoid(v)
    mask = (token[:, None] < length) & (channel[None, :] < num_channels)
    out = out_ptr + (batch * length + token[:, None]) * num_channels + channel[None, :]
    tl.store(out, v.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(  # noqa: PLR0917
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    documents_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    grad_batch: tl.tensor,
    grad_token: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    PARAMETER_GRADS: tl.constexpr,
) -> None:
    # dv of a position is computed by every program that needs it: neighbours in time share reads, not stores.
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    columns = channel < num_channels
    x_ptr += batch * x_batch
    grad_ptr += batch * grad_batch
    documents_ptr += batch * length
    grad_x = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for distance in tl.static_range(WIDTH):
        later = token + distance
        grad = _load_rows(grad_ptr, documents_ptr, later, token, grad_token, channel, length, num_channels, PACKED)
        if SILU:
            v = _preactivation(
                x_ptr,
                weight_ptr,
                bias_ptr,
                documents_ptr,
                later,
                x_token,
                channel,
                length,
                num_channels,
                ROWS,
                CHANNELS,
                WIDTH,
                HAS_BIAS,
                PACKED,
            )
            share = sigmoid(v)
            grad *= share * (1.0 + v * (1.0 - share))
        tap = tl.load(weight_ptr + channel * WIDTH + (WIDTH - 1 - distance), mask=columns, other=0.0).to(tl.float32)
        grad_x += tap[None, :] * grad
        if PARAMETER_GRADS:
            # Of the tap at this distance: what it reads is at `token`, what it adds to is `later`.
            x = _load_rows(x_ptr, documents_ptr, token, token, x_token, channel, length, num_channels, PACKED)
            program = batch * tl.num_programs(1) + tl.program_id(1)
            place = partial_ptr + (program * (WIDTH + 1) + WIDTH - 1 - distance) * num_channels + channel
            tl.store(place, tl.sum(grad * x, axis=0), mask=columns)
            if distance == 0:
                place = partial_ptr + (program * (WIDTH + 1) + WIDTH) * num_channels + channel
                tl.store(place, tl.sum(grad, axis=0), mask=columns)
    mask = (token[:, None] < length) & columns[None, :]
    out = grad_x_ptr + (batch * length + token[:, None]) * num_channels + channel[None, :]
    tl.store(out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _blocks(x: Tensor, largest: int) -> tuple[tuple[int, int, int], int]:
    """The grid and the channels of its programs, at most `largest`."""
    batch, length, channels = x.shape
    block = min(largest, next_power_of_2(channels))
    return (-(-channels // block), -(-length // ROWS), batch), block


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, documents: Tensor | None) -> Tensor:
    """Returns the convolution [B, T, C] of x whose channels are contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, block = _blocks(x, FORWARD_CHANNELS)
    _forward_kernel[grid](
        x,
        weight,
        or_empty(bias, weight),
        or_empty(documents, weight),
        out,
        *x.stride()[:2],
        *x.shape[1:],
        ROWS=ROWS,
        CHANNELS=block,
        WIDTH=weight.shape[1],
        HAS_BIAS=bias is not None,
        SILU=silu,
        PACKED=documents is not None,
        num_warps=WARPS,
    )
    return out


def launch_backward(  # noqa: PLR0917
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    documents: Tensor | None,
    *,
    parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of x, the weight and the bias, the last two fp32, or None unless `parameters`."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, block = _blocks(x, BACKWARD_CHANNELS)
    width = weight.shape[1]
    # A share a program, added up in a fixed order: no atomics.
    shape = (grid[1] * grid[2], width + 1, x.shape[2])
    partial = torch.empty(shape, dtype=torch.float32, device=x.device) if parameters else None
    _backward_kernel[grid](
        grad,
        x,
        weight,
        or_empty(bias, weight),
        or_empty(documents, weight),
        grad_x,
        or_empty(partial, grad_x),
        *grad.stride()[:2],
        *x.stride()[:2],
        *x.shape[1:],
        ROWS=ROWS,
        CHANNELS=block,
        WIDTH=width,
        HAS_BIAS=bias is not None,
        SILU=silu,
        PACKED=documents is not None,
        PARAMETER_GRADS=parameters,
        num_warps=WARPS,
    )
    if partial is None:
        return grad_x, None, None
    total = partial.sum(0)
    return grad_x, total[:width].t(), total[width]


class _CausalConvTriton(torch.autograd.Function):
    """One launch each way; saves the inputs alone."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, documents: Tensor | None
    ) -> Tensor:
        """x: [B, T, C]; weight: [C, W]."""
        ctx.save_for_backward(x, weight, bias, documents)
        ctx.silu = silu
        return launch_forward(contiguous_channels(x), weight.contiguous(), bias, silu, documents)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x, the weight and the bias, the last two only where one of them is asked for."""
        x, weight, bias, documents = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x, grad_weight, grad_bias = launch_backward(
            contiguous_channels(grads[0]),
            contiguous_channels(x),
            weight.contiguous(),
            bias,
            ctx.silu,
            documents,
            parameters=needs_weight or needs_bias,
        )
        return (
            grad_x if needs_x else None,
            grad_weight.to(weight.dtype) if needs_weight and grad_weight is not None else None,
            grad_bias.to(bias.dtype) if needs_bias and grad_bias is not None else None,
            None,
            None,
        )
