"""Quantise the rows of a matrix to fp8 (e4m3) with one scale a row, and multiply two such matrices.

    scale[n] = max_k |x[n, k] c[k]| / 448        q[n, k] = e4m3(x[n, k] c[k] / scale[n])

`c` is an optional factor for each column: the input gradient dX = dY W of a weight kept as W = diag(s) Q contracts over
the rows of W, so its scales s go into dY before that is quantised, and one stored Q serves both products.

The product is `torch._scaled_mm`, which needs a GPU of compute capability 8.9 or more, and here always float32
accumulation outside the tensor core's own registers unless `fast_accumulation` is asked for (on Hopper it keeps about
14 bits between partial sums, and is the faster).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels.triton_support import check_implementation, jit, next_power_of_2, tl

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite value of e4m3


class Rounded(NamedTuple):
    """Rows in fp8, `values * scale`: e4m3 `[N, K]`, contiguous, and float32 `[N, 1]`."""

    values: Tensor
    scale: Tensor


def empty_rounded(num_rows: int, num_columns: int, device: torch.device) -> Rounded:
    """Returns memory for rows in fp8."""
    values = torch.empty((num_rows, num_columns), dtype=FP8, device=device)
    return Rounded(values, torch.empty((num_rows, 1), dtype=torch.float32, device=device))


def quantize_rows_reference(x: Tensor, column_factor: Tensor | None = None) -> Rounded:
    """Returns `x` `[N, K]` in fp8, in plain torch."""
    values = x.float() if column_factor is None else x.float() * column_factor
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return Rounded((values / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


@jit
def scale_of(highest: tl.tensor) -> tl.tensor:
    """Returns the scale of rows whose largest magnitudes are `highest`."""
    return tl.maximum(highest, 1e-12) / 448.0


@jit
def to_e4m3(values: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Returns fp32 `values` over `scale`, still in fp32, where e4m3 can hold them."""
    return tl.minimum(tl.maximum(values / scale, -448.0), 448.0)


@jit
def store_rounded(  # noqa: PLR0917
    values: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, row: tl.tensor, column: tl.tensor, width: tl.tensor
) -> None:
    """Writes one row of fp32 `values`, 0 beyond `width`, in e4m3 and its scale."""
    scale = scale_of(tl.max(tl.abs(values), axis=0))
    tl.store(scale_ptr + row, scale)
    quantized = to_e4m3(values, scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, quantized, mask=column < width)


@jit
def _quantize_rows_kernel(  # noqa: PLR0917
    x_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < num_columns
    values = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        values *= tl.load(factor_ptr + column, mask=mask, other=0.0)
    store_rounded(values, out_ptr, scale_ptr, row, column, num_columns)


def quantize_rows_triton(x: Tensor, column_factor: Tensor | None = None) -> Rounded:
    """Returns what `quantize_rows_reference` does, reading `x` once; its last dimension must be contiguous."""
    num_rows, num_columns = x.shape
    out = empty_rounded(num_rows, num_columns, x.device)
    block = next_power_of_2(num_columns)
    _quantize_rows_kernel[(num_rows,)](
        x,
        x if column_factor is None else column_factor,
        *out,
        x.stride(0),
        num_columns,
        BLOCK=block,
        HAS_FACTOR=column_factor is not None,
        num_warps=min(16, max(4, block // 1024)),
    )
    return out


def quantize_rows(x: Tensor, column_factor: Tensor | None = None, *, implementation: str = "reference") -> Rounded:
    """Returns `x` `[N, K]` as (e4m3 `[N, K]` contiguous, float32 scale `[N, 1]`), so that `x * factor ~ q * scale`.

    `column_factor` is float32 `[K]` or None; rows of zeros give zeros.
    """
    if check_implementation(implementation) and x.numel():
        return quantize_rows_triton(x if x.stride(1) == 1 else x.contiguous(), column_factor)
    return quantize_rows_reference(x, column_factor)


def can_multiply_fp8(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 matrices in hardware (compute capability 8.9 or later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def plain_matmul(x: Tensor, weight: Tensor, *, fast_accumulation: bool = False, out: Tensor | None = None) -> Tensor:
    """Returns `x @ weight.T` in bf16, of e4m3 `x` `[N, K]` and `weight` `[M, K]` as they are, without their scales.

    In `out` if that is given. Values reach 448^2 K, which bf16 holds. What `scaled_matmul` says of the hardware holds
    here too.
    """
    if not _in_hardware(x, weight):
        product = (x.float() @ weight.float().T).to(torch.bfloat16)
        return product if out is None else out.copy_(product)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": fast_accumulation}
    if out is None:
        return torch._scaled_mm(x, weight.T, scale_a=one, scale_b=one, **options)
    return torch._scaled_mm(x, weight.T, one, one, out=out, **options)


def takes_sizes(*sizes: int) -> bool:
    """Whether the hardware multiplies matrices of such sizes, rows of the first one aside: 16 divides them."""
    return all(size % 16 == 0 for size in sizes)


def _in_hardware(x: Tensor, weight: Tensor) -> bool:
    """Whether the device multiplies these, which have rows at all."""
    return can_multiply_fp8(x.device) and takes_sizes(*x.shape[1:], *weight.shape) and x.shape[0] > 0


def scaled_matmul(
    x: Tensor,
    weight: Tensor,
    *,
    x_scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    fast_accumulation: bool = False,
) -> Tensor:
    """Returns `(x * x_scale) @ (weight * weight_scale).T` in `dtype`, from e4m3 `x` `[N, K]` and `weight` `[M, K]`.

    Scales are float32 `[N, 1]` and `[M, 1]`. Both matrices must have contiguous rows, as Hopper's fp8 instructions read
    only along K. Without hardware for it (or with sizes not divisible by 16, which it cannot take) the same product is
    computed in float32.
    """
    if not _in_hardware(x, weight):
        return ((x.float() * x_scale) @ (weight.float() * weight_scale).T).to(dtype)
    return torch._scaled_mm(
        x,
        weight.T,
        scale_a=x_scale,
        scale_b=weight_scale.T.contiguous(),
        out_dtype=torch.bfloat16,  # the only one that scales by rows may have
        use_fast_accum=fast_accumulation,
    ).to(dtype)
