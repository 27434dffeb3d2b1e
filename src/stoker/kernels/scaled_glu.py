"""Gated activations of gate and up that are multiplied by a factor for each column first, as DoRA's are.

    [g, u] = halves of c · Z + bias        y = a(g) · u        dZ = c · [dg, du]        dc = Σ_rows [dg, du] · Z

The formulas of y, dg and du are those of `kernels/glu.py`. Z, as the product gives it, is all that is kept: no pass of
its own multiplies it, and the backward has the two factors of dc at hand where it makes [dg, du].
"""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.kernels import dora, glu
from stoker.kernels.dora import COLUMNS, PROGRAM_ROWS, ROWS, partial_sums
from stoker.kernels.glu import activate
from stoker.kernels.triton_support import check_implementation, jit, next_power_of_2, tl, triton

_BLOCK = 1024


def gated_scaled(
    z: Tensor, scale: Tensor, bias: Tensor | None, *, activation: str = "silu", implementation: str = "reference"
) -> Tensor:
    """Returns the gated activation [N, F] of Z [N, 2F], gate first; scale fp32 [2F], bias [2F] or None.

    ValueError for an unknown activation or implementation.
    """
    glu.check_activation(activation)
    if not check_implementation(implementation) or not z.numel():
        return glu.gated(dora.scaled(z, scale, bias=bias), activation=activation)
    num_rows, num_columns = z.shape[0], z.shape[1] // 2
    out = torch.empty((num_rows, num_columns), dtype=z.dtype, device=z.device)
    block = min(_BLOCK, next_power_of_2(num_columns))
    _forward_kernel[(num_rows, triton.cdiv(num_columns, block))](
        z,
        scale,
        scale if bias is None else bias,
        out,
        z.stride(0),
        num_columns,
        BLOCK=block,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
    return out


def gated_scaled_backward(
    z: Tensor,
    grad: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "silu",
    implementation: str = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dZ [N, 2F], written over Z; `gated_scaled(z)` [N, F]; dc, fp32 [2F]) from the output's gradient [N, F].

    Z and grad are contiguous; Triton writes the activation over `grad`. ValueError as above.
    """
    glu.check_activation(activation)
    if not check_implementation(implementation) or not z.numel():
        grad_y, activated = glu.gated_backward(dora.scaled(z, scale, bias=bias), grad, activation=activation)
        total = z.mul_(grad_y).sum(0, dtype=torch.float32)
        return dora.scaled(grad_y, scale, out=z), activated, total
    num_rows, num_columns = grad.shape
    partial = partial_sums(z, 2 * num_columns)
    _backward_kernel[(triton.cdiv(num_columns, COLUMNS), partial.shape[0])](
        z,
        grad,
        scale,
        scale if bias is None else bias,
        partial,
        num_rows,
        num_columns,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        PROGRAM_ROWS=PROGRAM_ROWS,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
    return z, grad, partial.sum(0)


@jit
def _forward_kernel(  # noqa: PLR0917
    z_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    z_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    z = z_ptr + row * z_stride + column
    gate = tl.load(z, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr + column, mask=mask, other=0.0)
    up = tl.load(z + num_columns, mask=mask, other=0.0).to(tl.float32)
    up *= tl.load(scale_ptr + num_columns + column, mask=mask, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(bias_ptr + num_columns + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = activate(gate, ACTIVATION)
    tl.store(out_ptr + row * num_columns + column, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(  # noqa: PLR0917
    z_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    # Reads all it needs of a tile before it writes: Z holds its gradient next, and grad the activation.
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < num_columns
    gate_scale = tl.load(scale_ptr + column, mask=in_columns, other=0.0)[None, :]
    up_scale = tl.load(scale_ptr + num_columns + column, mask=in_columns, other=0.0)[None, :]
    if HAS_BIAS:
        gate_bias = tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        up_bias = tl.load(bias_ptr + num_columns + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    else:
        gate_bias, up_bias = 0.0, 0.0
    gate_total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    up_total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    begin = tl.program_id(1) * PROGRAM_ROWS
    dtype = z_ptr.dtype.element_ty
    for first in range(0, PROGRAM_ROWS, ROWS):
        row = (begin + first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < num_rows)[:, None] & in_columns[None, :]
        place = z_ptr + row[:, None] * (2 * num_columns) + column[None, :]
        grad_place = grad_ptr + row[:, None] * num_columns + column[None, :]
        z_gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        z_up = tl.load(place + num_columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_place, mask=mask, other=0.0).to(tl.float32)
        gate, up = z_gate * gate_scale + gate_bias, z_up * up_scale + up_bias
        value, slope = activate(gate, ACTIVATION)
        grad_gate, grad_up = grad * up * slope, grad * value
        gate_total += grad_gate * z_gate
        up_total += grad_up * z_up
        tl.store(place, (grad_gate * gate_scale).to(dtype), mask=mask)
        tl.store(place + num_columns, (grad_up * up_scale).to(dtype), mask=mask)
        tl.store(grad_place, (value * up).to(grad_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + tl.program_id(1) * 2 * num_columns + column
    tl.store(partial, tl.sum(gate_total, axis=0), mask=in_columns)
    tl.store(partial + num_columns, tl.sum(up_total, axis=0), mask=in_columns)
