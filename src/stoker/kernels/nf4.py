"""Dequantise NF4: 4-bit NormalFloat, an absolute maximum per block, itself kept in 8 bits (QLoRA, arXiv:2305.14314).

A weight is cut into blocks of `block_size` (64) values in memory order. Byte `i` holds values `2i` (high nibble) and
`2i + 1` (low nibble), each an index into the 16 values of `code`:

    value = code[nibble] * absmax[block]
    absmax[block] = nested_code[q[block]] * nested_absmax[block // 256] + nested_offset[block // 256]

all in float32, rounded once to the output's dtype. Multiply and add stay separate (no fused multiply-add), which makes
the values bit-identical to bitsandbytes'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels.triton_support import check_implementation, jit, next_power_of_2, tl, triton

# Values of the four-bit code: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Bytes a program reads: 2,048 values, 4 KB of bf16 written, which keeps enough stores in flight on every GPU.
BYTES_PER_PROGRAM = 1024


class NF4Tensors(NamedTuple):
    """What an NF4 weight is stored as. The nested fields are None when `absmax` is plain float32 [blocks]."""

    packed: Tensor  # uint8 [ceil(values / 2)]
    absmax: Tensor  # uint8 [blocks], or float32 [blocks] without double quantisation
    code: Tensor  # float32 [16]
    nested_code: Tensor | None  # float32 [256]
    nested_absmax: Tensor | None  # float32 [ceil(blocks / nested_block_size)]
    nested_offset: Tensor | None  # float32, one for each nested block
    block_size: int = 64
    nested_block_size: int = 256


def block_absmax(tensors: NF4Tensors) -> Tensor:
    """Returns the absolute maximum of every block, float32 [blocks]."""
    if tensors.nested_code is None or tensors.nested_absmax is None or tensors.nested_offset is None:
        return tensors.absmax.float()
    group = torch.arange(tensors.absmax.numel(), device=tensors.absmax.device) // tensors.nested_block_size
    return tensors.nested_code[tensors.absmax.int()] * tensors.nested_absmax[group] + tensors.nested_offset[group]


def dequantize_reference(tensors: NF4Tensors, out: Tensor) -> Tensor:
    """Fills `out` (contiguous, any float dtype, as many values as the weight has) and returns it; plain torch."""
    nibbles = torch.stack((tensors.packed >> 4, tensors.packed & 15), dim=-1).flatten()[: out.numel()]
    scale = block_absmax(tensors).repeat_interleave(tensors.block_size)[: out.numel()]
    return out.copy_((tensors.code[nibbles.int()] * scale).view_as(out))


@jit
def _dequantize_kernel(  # noqa: PLR0917
    packed_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    code_ptr: tl.tensor,
    nested_code_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    nested_offset_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    num_values: tl.tensor,
    num_bytes: tl.tensor,
    values_per_expert: tl.tensor,
    BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ROUTED: tl.constexpr,
) -> None:
    # A program handles BLOCKS blocks of BLOCK_BYTES bytes. Offsets are int64: a weight may pass 2^31 values.
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    if ROUTED:  # nobody reads the weights of an expert without rows
        expert = first_block * (2 * BLOCK_BYTES) // values_per_expert
        if tl.load(ends_ptr + expert) == tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0):
            return
    block = first_block + tl.arange(0, BLOCKS)
    block_mask = block * (2 * BLOCK_BYTES) < num_values
    if NESTED:
        group = block // NESTED_BLOCK_SIZE
        index = tl.load(absmax_ptr + block, mask=block_mask, other=0).to(tl.int32)
        scale = tl.load(nested_code_ptr + index) * tl.load(nested_absmax_ptr + group, mask=block_mask, other=0.0)
        scale += tl.load(nested_offset_ptr + group, mask=block_mask, other=0.0)
    else:
        scale = tl.load(absmax_ptr + block, mask=block_mask, other=0.0)
    byte = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    high = tl.load(code_ptr + (packed >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (packed & 15)) * scale[:, None]
    value = block[:, None] * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
    # Interleaved in registers, so that a thread writes its values side by side.
    tl.store(out_ptr + value, tl.interleave(high, low).to(out_ptr.dtype.element_ty), mask=value < num_values)


def dequantize_triton(tensors: NF4Tensors, out: Tensor, ends: Tensor | None = None) -> Tensor:
    """Fills `out` as `dequantize_reference` does, in one launch; returns it.

    With `ends` int32 [E], where the rows of each expert end, only experts that have rows: `out` holds E equal parts.
    """
    blocks = max(1, 2 * BYTES_PER_PROGRAM // tensors.block_size)
    values_per_expert = 0 if ends is None else out.numel() // ends.shape[0]
    is_routed = ends is not None and values_per_expert % (next_power_of_2(blocks) * tensors.block_size) == 0
    nested = tensors.nested_code is not None
    _dequantize_kernel[(triton.cdiv(out.numel(), blocks * tensors.block_size),)](
        tensors.packed,
        tensors.absmax,
        tensors.code,
        tensors.nested_code if nested else tensors.code,
        tensors.nested_absmax if nested else tensors.code,
        tensors.nested_offset if nested else tensors.code,
        out,
        ends if is_routed else tensors.code,
        out.numel(),
        tensors.packed.numel(),
        values_per_expert,
        BLOCK_BYTES=tensors.block_size // 2,
        BLOCKS=next_power_of_2(blocks),
        NESTED_BLOCK_SIZE=tensors.nested_block_size,
        NESTED=nested,
        ROUTED=is_routed,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def dequantize(
    tensors: NF4Tensors, out: Tensor, *, ends: Tensor | None = None, implementation: str = "reference"
) -> Tensor:
    """Fills `out` with the dequantised values of `tensors`, in memory order, and returns it.

    `out` is contiguous, of any shape with the weight's number of values, float32, bfloat16 or float16; it is usually a
    piece of a buffer that is used again for the next weight. `implementation` is "reference" or "triton". `ends` int32
    [E]: of E experts' weights, those without rows may be left out (Triton does, where a weight is whole blocks).
    """
    if not out.is_contiguous() or (out.numel() + 1) // 2 != tensors.packed.numel():
        raise ValueError(f"out {tuple(out.shape)} must be contiguous with {2 * tensors.packed.numel()} values")
    if out.numel() == 0:
        return out
    if check_implementation(implementation):
        return dequantize_triton(tensors, out, ends)
    return dequantize_reference(tensors, out)
