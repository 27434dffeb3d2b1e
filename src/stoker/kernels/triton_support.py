"""Triton where it is installed, and a stand-in where it is not, so that every kernel file can be imported anywhere.

Kernel files write `from __future__ import annotations` (the annotation `tl.constexpr` is then only text) and decorate
with `jit` from here. Without Triton the decorated functions are inert; `require()` turns a launch into a clear error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton as _triton
    import triton.language as _language
except ImportError:
    _triton = _language = None

try:
    from triton.tools.tensor_descriptor import TensorDescriptor as _TensorDescriptor
except ImportError:  # before 3.4
    _TensorDescriptor = None

TensorDescriptor: Any = _TensorDescriptor
"""Triton's view of a tensor in boxes, which Hopper copies by itself; None without it."""
triton: Any = _triton
tl: Any = _language

# A pass over a row keeps it in registers: past 64 K elements a row is read in pieces instead (Triton's limit is 2^20).
MAX_ROW_BLOCK = 65536


KERNELS: list[Any] = []
"""Every function that `jit` has made a kernel of."""


def jit(function: Callable[..., Any]) -> Any:
    """Returns `function` compiled by Triton at its first launch, or unchanged where Triton is not installed."""
    return jit_unspecialized()(function)


def jit_unspecialized(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator like `jit` for kernels whose integers `names` change from launch to launch.

    Triton would compile anew for those that are 1 or a multiple of 16.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if triton is None:
            return function
        kernel = triton.jit(function, do_not_specialize=list(names))
        KERNELS.append(kernel)
        return kernel

    return decorate


def constant(value: float) -> Any:
    """Returns `value` as kernels may read it from their module, or itself where Triton is not installed."""
    return value if triton is None else tl.constexpr(value)


def available() -> bool:
    """Whether Triton is installed (kernels run on a GPU, or on a CPU under `TRITON_INTERPRET=1`)."""
    return triton is not None


def check_implementation(implementation: str) -> bool:
    """Returns whether Triton is asked for; raises ValueError for an unknown name, or when Triton is missing."""
    if implementation not in ("reference", "triton"):
        raise ValueError(f"no implementation {implementation!r}; known: reference, triton")
    if implementation == "triton" and triton is None:
        raise ValueError("implementation = 'triton', but Triton is not installed. Use 'reference'.")
    return implementation == "triton"


def next_power_of_2(value: int) -> int:
    """Returns the smallest power of two that is at least `value` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """Returns x [..., D] as [N, D] whose rows are contiguous; a view wherever the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def contiguous_channels(x: Tensor) -> Tensor:
    """Returns `x` with its last dimension contiguous: itself wherever that is so already."""
    return x if x.stride(-1) == 1 else x.contiguous()


def warps_of_row(block: int) -> int:
    """Returns the warps for a row of `block` values in registers.

    Eight to sixteen values a thread, which keeps a row of 8,192 out of local memory.
    """
    return min(16, max(1, block // 512))


def num_programs(x: Tensor, *, per_multiprocessor: int = 4) -> int:
    """Returns how many programs fill the device of `x`: a few for each multiprocessor, one or two on a CPU."""
    if not x.is_cuda:
        return 2  # the interpreter runs programs one after another; two still exercise the loop over programs
    return per_multiprocessor * torch.cuda.get_device_properties(x.device).multi_processor_count


# The interpreter multiplies the bits of bfloat16 as if they were integers; widened they are exact, as on a tensor core.
_WIDEN = None if triton is None else tl.constexpr(bool(triton.knobs.runtime.interpret))


@jit
def dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Returns a [M, K] times b [K, N] summed in float32, without rounding float32 to fewer bits first."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
