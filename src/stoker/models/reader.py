"""Tensors of a model's folder by name, those that bitsandbytes packed in NF4 among them."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stoker.errors import ModelError
from stoker.models import weight_names
from stoker.models.folder import WeightIndex
from stoker.quant import nf4


class Reader:
    """Tensors of a folder by name; files are opened when first asked for and closed with `stack`, or by `let_go`.

    `packed` are the weights in NF4: their values lie in tensors of their own, which are not in `names`. Those in
    `transposed` are stored [in, out] and read [out, in]; those in `interleaved`, [E, 2 I, ...], come with even rows
    (gate) before odd ones (up).
    """

    def __init__(self, index: WeightIndex, stack: ExitStack) -> None:
        self.folder = index.folder
        self._paths = index.files
        self._files: dict[Path, Any] = {}
        stack.callback(self.let_go)
        self.names, self.packed = weight_names.of_folder(index)
        self.transposed: set[str] = set()
        self.interleaved: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, of a packed one before it was packed."""
        if name in self.packed:
            return self._packed_shape(name)
        shape = tuple(self._file(name).get_slice(name).get_shape())
        return (*shape[:-2], shape[-1], shape[-2]) if name in self.transposed else shape

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        return self._file(name).get_tensor(name)

    def dense(self, name: str) -> Tensor:
        """The tensor's values: of a packed one dequantised, in the dtype that it had before."""
        if name not in self.packed:
            tensor = self.tensor(name)
            tensor = tensor.transpose(-1, -2) if name in self.transposed else tensor
            return torch.cat((tensor[:, ::2], tensor[:, 1::2]), dim=1) if name in self.interleaved else tensor
        module = name.removesuffix(".weight")
        weight = nf4.from_checkpoint(self.packed_tensors(name), (module,))
        return weight.dequantize(dtype=weight.source_dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop - 1` of `dense(name)`; of what is not packed no more than those is read."""
        if name in self.packed:
            return self.dense(name)[start:stop]
        stored = self._file(name).get_slice(name)
        if name in self.transposed and len(stored.get_shape()) == 2:
            return stored[:, start:stop].T
        tensor = stored[start:stop]
        tensor = tensor.transpose(-1, -2) if name in self.transposed else tensor
        return torch.cat((tensor[:, ::2], tensor[:, 1::2]), dim=1) if name in self.interleaved else tensor

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor's values: of a packed one that which it had before."""
        if name in self.packed:
            return getattr(torch, str(self._packed_state(name)["dtype"]).removeprefix("torch."))
        # Of no rows: the library names dtypes by its own short names.
        return self._file(name).get_slice(name)[:0].dtype

    def let_go(self) -> None:
        """Closes the files that are open: pages of them that were read no longer count as this process's memory."""
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    def packed_tensors(self, name: str, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What makes up a packed weight, by name, on `device`."""
        there = [name, *(f"{name}{part}" for part in weight_names.PARTS if f"{name}{part}" in self._paths)]
        return {one: self.tensor(one).to(device) for one in there}

    def _packed_shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self._packed_state(name)["shape"])

    def _packed_state(self, name: str) -> dict[str, Any]:
        """What describes a packed weight: its `shape` and `dtype` before, among other things."""
        try:
            state = json.loads(bytes(self.tensor(f"{name}{weight_names.PACKED}").tolist()))
            return {**state, "shape": [int(size) for size in state["shape"]], "dtype": str(state["dtype"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the quantisation state of {name} cannot be read.",
                where=str(self.folder),
                fix="Fetch the model again.",
            ) from error

    def _file(self, name: str) -> Any:
        path = self._paths[name]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt").__enter__()
        return self._files[path]
