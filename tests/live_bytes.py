"""Counts bytes of tensors that live at once."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_EMPTY = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided)


class LiveBytes(TorchDispatchMode):
    """Counts, on a CPU, bytes of tensors that live at once, as `torch.cuda.max_memory_allocated` does on a GPU.

    Within it, storages that operations make are followed until they are freed; `peak` is the most at one time.

    Storages made before do not count, nor does what an operation needs inside itself. `clears`: memory that nothing
    has written yet is zero, for kernels that do not run.
    """

    def __init__(self, *, clears: bool = False) -> None:
        super().__init__()
        self.clears = clears
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        """Bytes that live now."""
        self._living = {key: value for key, value in self._living.items() if not value[0].expired()}
        return sum(size for _, size in self._living.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        if self.clears and func.overloadpacket in _EMPTY:
            result.zero_()
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if storage.nbytes() and key not in given:
                self._living[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
