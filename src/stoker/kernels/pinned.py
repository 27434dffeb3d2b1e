"""Page-locked host memory in exact sizes, fast to get.

A GPU copies to and from page-locked memory at the link's full speed and beside its compute. PyTorch's own way
(`pin_memory=True`) asks the driver for every block, which touches page after page on one thread, and rounds sizes up to
the next power of two
(https://docs.pytorch.org/docs/main/generated/torch.cuda.memory.host_memory_stats.html): 900 MB become 1 GiB. Here all
threads touch ordinary memory, in huge pages where the system has them, then the driver locks it (`cudaHostRegister`).
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor


class _LockedPages(mmap.mmap):
    """Anonymous memory that is unlocked before it is unmapped, when the last tensor on it is gone."""

    address = 0

    def __del__(self) -> None:
        if self.address:
            _driver().cudaHostUnregister(self.address)


def _driver() -> Any:
    # Its type in PyTorch's stubs is that of a build without CUDA: None.
    return torch.cuda.cudart()


def empty_pinned(numel: int, dtype: torch.dtype) -> Tensor:
    """Returns a page-locked host tensor of `numel` elements; its values mean nothing.

    Raises:
        MemoryError: the system does not let so much memory be locked.
    """
    num_bytes = max(1, numel * dtype.itemsize)
    pages = _LockedPages(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes)
    buffer.zero_()  # all threads touch the pages; the driver alone would do it on one
    code = int(_driver().cudaHostRegister(buffer.data_ptr(), num_bytes, 0))
    if code != 0:
        raise MemoryError(
            f"{num_bytes / 2**30:.2f} GiB of host memory could not be page-locked (CUDA error {code}). Look at "
            "`ulimit -l` and at the container's memory limit, or set engine.offload_activations: false."
        )
    pages.address = buffer.data_ptr()
    return buffer[: numel * dtype.itemsize].view(dtype)
