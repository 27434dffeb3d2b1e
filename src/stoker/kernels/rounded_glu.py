"""Gated activations whose results are left in fp8 as well, for the products that read them so.

The formulas are those of `kernels/glu.py`, and the rounding is that of `kernels/fp8.py`, of the very values that are
stored: results are those of the two passes one after the other.

    forward     y = a(g) · u                    y in the working dtype, for adapters, and in fp8
    backward    [dg, du] over gate_up, y over dy, and [dg, du] · c in fp8, c a factor for each column

A row's scale needs all of the row, which is wider than a program's registers (28,672 gradients of an 8B). A program
takes the row a piece at a time, then reads what it has just written once more: from the L2 cache, where a pass of its
own would read it from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.kernels import glu
from stoker.kernels.fp8 import Rounded, scale_of, to_e4m3
from stoker.kernels.glu import activate
from stoker.kernels.triton_support import check_implementation, jit, next_power_of_2, tl

BLOCK, WARPS = 2048, 8
"""Columns that a program takes at a time: eight a thread, so that several programs share a multiprocessor."""


def gated_rounded(gate_up: Tensor, rounded: Rounded, *, activation: str = "silu") -> Tensor:
    """Returns `glu.gated(gate_up)` [N, F] for gate_up [N, 2F] with contiguous rows; `rounded` takes it in fp8.

    By Triton alone, and without a gradient. ValueError for an unknown activation, or without Triton.
    """
    glu.check_activation(activation)
    check_implementation("triton")
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, num_columns), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block, warps = _piece(num_columns)
        _forward_kernel[(num_rows,)](
            gate_up,
            out,
            *rounded,
            gate_up.stride(0),
            num_columns,
            BLOCK=block,
            ACTIVATION=activation,
            num_warps=warps,
        )
    return out


def gated_rounded_backward(
    gate_up: Tensor, grad: Tensor, rounded: Rounded, factor: Tensor, *, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    """Returns (gradient of gate_up [N, 2F], written over it; `gated(gate_up)`, written over `grad` [N, F]).

    `rounded` takes the former times `factor`, fp32 [2F], in fp8. gate_up and grad are contiguous. By Triton alone;
    ValueError as above.
    """
    glu.check_activation(activation)
    check_implementation("triton")
    num_rows, num_columns = grad.shape
    if grad.numel():
        block, warps = _piece(num_columns)
        _backward_kernel[(num_rows,)](
            gate_up, grad, factor, *rounded, num_columns, BLOCK=block, ACTIVATION=activation, num_warps=warps
        )
    return gate_up, grad


def _piece(num_columns: int) -> tuple[int, int]:
    """Columns at a time, and warps."""
    block = min(BLOCK, next_power_of_2(num_columns))
    return block, max(1, WARPS * block // BLOCK)


@jit
def _forward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rounded_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    gate_up, out = gate_up_ptr + row * row_stride, out_ptr + row * num_columns
    highest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_columns
        # Read once: the cache is for what is written here.
        gate = tl.load(gate_up + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        up = tl.load(gate_up + num_columns + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        value, _ = activate(gate, ACTIVATION)
        result = (value * up).to(out_ptr.dtype.element_ty)
        tl.store(out + column, result, mask=mask)
        highest = tl.maximum(highest, tl.abs(result.to(tl.float32)))
    scale = scale_of(tl.max(highest, axis=0))
    tl.store(scale_ptr + row, scale)
    tl.debug_barrier()  # what other threads of the program wrote is there
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_columns
        values = tl.load(out + column, mask=mask, other=0.0).to(tl.float32)
        quantized = to_e4m3(values, scale).to(rounded_ptr.dtype.element_ty)
        tl.store(rounded_ptr + row * num_columns + column, quantized, mask=mask)


@jit
def _backward_kernel(  # noqa: PLR0917
    gate_up_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    rounded_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    # A piece is read before it is written: gate_up holds its gradient next, and grad the activation.
    row = tl.program_id(0).to(tl.int64)
    gate_up, grads = gate_up_ptr + row * 2 * num_columns, grad_ptr + row * num_columns
    dtype = gate_up_ptr.dtype.element_ty
    highest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_columns
        gate = tl.load(gate_up + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + num_columns + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        value, slope = activate(gate, ACTIVATION)
        grad_gate = (grad * up * slope).to(dtype)
        grad_up = (grad * value).to(dtype)
        tl.store(gate_up + column, grad_gate, mask=mask)
        tl.store(gate_up + num_columns + column, grad_up, mask=mask)
        activated = (value * up).to(grad_ptr.dtype.element_ty)
        tl.store(grads + column, activated, mask=mask, cache_modifier=".cs")  # not read again here
        gate_factor = tl.load(factor_ptr + column, mask=mask, other=0.0)
        up_factor = tl.load(factor_ptr + num_columns + column, mask=mask, other=0.0)
        highest = tl.maximum(highest, tl.abs(grad_gate.to(tl.float32) * gate_factor))
        highest = tl.maximum(highest, tl.abs(grad_up.to(tl.float32) * up_factor))
    scale = scale_of(tl.max(highest, axis=0))
    tl.store(scale_ptr + row, scale)
    tl.debug_barrier()  # what other threads of the program wrote is there
    # From the end, which was written last and is in the cache for certain.
    last = (tl.cdiv(2 * num_columns, BLOCK) - 1) * BLOCK
    for back in range(0, 2 * num_columns, BLOCK):
        column = last - back + tl.arange(0, BLOCK)
        mask = column < 2 * num_columns
        values = tl.load(gate_up + column, mask=mask, other=0.0).to(tl.float32)
        values *= tl.load(factor_ptr + column, mask=mask, other=0.0)
        quantized = to_e4m3(values, scale).to(rounded_ptr.dtype.element_ty)
        tl.store(rounded_ptr + row * 2 * num_columns + column, quantized, mask=mask, cache_modifier=".cs")
