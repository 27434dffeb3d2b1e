"""Root-mean-square norm of groups of channels with a gate, before or after it (Mamba-2, arXiv:2405.21060).

    gate first:  v = y · silu(z),   out = v · r · w          r = (mean(v²) + ε)^-½ over each group of channels
    gate last:   v = y,             out = v · r · w · silu(z)

    g  = dout · w (· silu(z) if last)       dv = r · g − v · (r³ / |group|) · Σ_group (g · v)
    dw = Σ_rows dout · v · r (· silu(z) if last)

Saved for backward: y, z and r (one number a group). Statistics are fp32 whatever the dtype of y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stoker.kernels.recurrent import or_empty, sigmoid
from stoker.kernels.triton_support import (
    MAX_ROW_BLOCK,
    as_rows,
    check_implementation,
    jit,
    next_power_of_2,
    num_programs,
    tl,
    warps_of_row,
)


def gated_rms_norm_reference(
    y: Tensor, z: Tensor, weight: Tensor, epsilon: float, *, groups: int = 1, gate_first: bool = True
) -> Tensor:
    """The formula, step by step; the oracle of the implementations below."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    wide, gate = y.to(dtype), F.silu(z.to(dtype))
    if gate_first:
        wide = wide * gate
    parts = wide.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + epsilon)
    out = parts.flatten(-2) * weight.to(dtype)
    return (out if gate_first else out * gate).to(y.dtype)


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    groups: int = 1,
    gate_first: bool = True,
    implementation: str = "reference",
) -> Tensor:
    """Returns the gated norm of `y` [..., D], in its dtype.

    z: [..., D], the gate before its SiLU; weight: [D]; the mean is taken over each of `groups` equal parts of the
    channels. `gate_first`: norm(y silu(z)), else norm(y) silu(z). `implementation`: "reference" or "triton"; ValueError
    for an unknown one, and for channels that `groups` does not divide.
    """
    if y.shape[-1] % groups:
        raise ValueError(f"{y.shape[-1]} channels do not split into {groups} groups")
    if check_implementation(implementation) and y.shape[-1] // groups <= MAX_ROW_BLOCK:
        return _GatedRmsNormTriton.apply(y, z, weight, epsilon, groups, gate_first)
    return gated_rms_norm_reference(y, z, weight, epsilon, groups=groups, gate_first=gate_first)


@jit
def _forward_kernel(  # noqa: PLR0917
    y_ptr: tl.tensor,
    z_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    y_stride: tl.tensor,
    z_stride: tl.tensor,
    group_size: tl.tensor,
    epsilon: tl.tensor,
    BLOCK: tl.constexpr,
    GATE_FIRST: tl.constexpr,
) -> None:
    row, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    inside = tl.arange(0, BLOCK)
    mask = inside < group_size
    column = group * group_size + inside
    value = tl.load(y_ptr + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(z_ptr + row * z_stride + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    gate *= sigmoid(gate)
    if GATE_FIRST:
        value *= gate
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / group_size + epsilon)
    tl.store(rstd_ptr + row * groups + group, rstd)
    out = value * rstd * weight
    if not GATE_FIRST:
        out *= gate
    place = out_ptr + row * groups * group_size + column
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(  # noqa: PLR0917
    grad_ptr: tl.tensor,
    y_ptr: tl.tensor,
    z_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    grad_y_ptr: tl.tensor,
    grad_z_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    grad_stride: tl.tensor,
    y_stride: tl.tensor,
    z_stride: tl.tensor,
    num_rows: tl.tensor,
    group_size: tl.tensor,
    BLOCK: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
) -> None:
    # As in rms_norm: every num_programs-th row, and a share of the weight's gradient in registers.
    program, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    inside = tl.arange(0, BLOCK)
    mask = inside < group_size
    column = group * group_size + inside
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    partial = tl.zeros((BLOCK,), dtype=tl.float32)
    for row_index in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(row_index, tl.int64)
        y = tl.load(y_ptr + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row * groups + group)
        share = sigmoid(z)
        gate = z * share
        value = y * gate if GATE_FIRST else y
        grad_normed = grad if GATE_FIRST else grad * gate
        if WEIGHT_GRAD:
            partial += grad_normed * value * rstd
        scaled = grad_normed * weight
        dot = tl.sum(scaled * value, axis=0) / group_size
        grad_value = rstd * scaled - (rstd * rstd * rstd * dot) * value
        # Of the gate: what multiplies it in the product that it is part of.
        grad_gate = grad_value * y if GATE_FIRST else grad * y * rstd * weight
        grad_y = grad_value * gate if GATE_FIRST else grad_value
        grad_z = grad_gate * share * (1.0 + z * (1.0 - share))
        place = row * groups * group_size + column
        tl.store(grad_y_ptr + place, grad_y.to(grad_y_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_z_ptr + place, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        tl.store(partial_ptr + program.to(tl.int64) * groups * group_size + column, partial, mask=mask)


def launch_forward(
    y: Tensor, z: Tensor, weight: Tensor, epsilon: float, groups: int, *, gate_first: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gated norm of y [N, D] and the factors [N, groups] of its groups."""
    rows, channels = y.shape
    out = torch.empty((rows, channels), dtype=y.dtype, device=y.device)
    rstd = torch.empty((rows, groups), dtype=torch.float32, device=y.device)
    block = next_power_of_2(channels // groups)
    if rows:
        _forward_kernel[(rows, groups)](
            y,
            z,
            weight,
            out,
            rstd,
            y.stride(0),
            z.stride(0),
            channels // groups,
            epsilon,
            BLOCK=block,
            GATE_FIRST=gate_first,
            num_warps=warps_of_row(block),
        )
    return out, rstd


def launch_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, *, gate_first: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of y and z [N, D] and of the weight [D] (fp32), the last None unless needed."""
    rows, channels = y.shape
    groups = rstd.shape[1]
    grad_y, grad_z = (torch.empty((rows, channels), dtype=v.dtype, device=v.device) for v in (y, z))
    programs = min(rows, num_programs(y)) if needs_weight else rows
    partial = torch.empty((programs, channels), dtype=torch.float32, device=y.device) if needs_weight else None
    block = next_power_of_2(channels // groups)
    if rows:
        _backward_kernel[(programs, groups)](
            grad,
            y,
            z,
            weight,
            rstd,
            grad_y,
            grad_z,
            or_empty(partial, rstd),
            grad.stride(0),
            y.stride(0),
            z.stride(0),
            rows,
            channels // groups,
            BLOCK=block,
            GATE_FIRST=gate_first,
            WEIGHT_GRAD=needs_weight,
            num_warps=warps_of_row(block),
        )
    return grad_y, grad_z, None if partial is None else partial.sum(0)


class _GatedRmsNormTriton(torch.autograd.Function):
    """One launch each way."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float, groups: int, gate_first: bool
    ) -> Tensor:
        """y and z: [..., D]."""
        out, rstd = launch_forward(as_rows(y), as_rows(z), weight, epsilon, groups, gate_first=gate_first)
        ctx.save_for_backward(y, z, weight, rstd)
        ctx.gate_first = gate_first
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of y, z and, where asked for, the weight."""
        y, z, weight, rstd = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[2]
        grad_y, grad_z, grad_weight = launch_backward(
            as_rows(grads[0]),
            as_rows(y),
            as_rows(z),
            weight,
            rstd,
            gate_first=ctx.gate_first,
            needs_weight=needs_weight,
        )
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_y.view(y.shape), grad_z.view(z.shape), grad_weight, None, None, None
