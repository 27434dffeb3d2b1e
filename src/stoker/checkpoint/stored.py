"""Tensors of a checkpoint by name, read when they are asked for, whoever wrote them in however many parts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from stoker.checkpoint.tensors import PARTS


class StoredTensors(Mapping[str, Tensor]):
    """The tensors in safetensors `files`, some of them in parts; what is read takes memory for one tensor.

    Of a tensor in parts, `__getitem__` puts the whole together, and `rows` reads no more than is asked for.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._boxes: dict[str, list[tuple[Path, tuple[int, ...]]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                parts = json.loads((file.metadata() or {}).get(PARTS, "{}"))
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    shape = tuple(file.get_slice(name).get_shape())
                    offsets, whole = parts.get(name, ((0,) * len(shape), shape))
                    self._boxes.setdefault(name, []).append((path, tuple(offsets)))
                    self._shapes[name] = tuple(whole)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor."""
        with safe_open(self._boxes[name][0][0], framework="pt") as file:
            part = file.get_slice(name)
            # Of no rows: the library names dtypes by its own short names.
            return (part[:0] if part.get_shape() else file.get_tensor(name)).dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop - 1` of a tensor that has rows."""
        found: Tensor | None = None
        for path, offsets in self._boxes[name]:
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(name)
                shape = part.get_shape()
                first, last = max(start, offsets[0]), min(stop, offsets[0] + shape[0])
                if last <= first and found is not None:
                    continue
                box = part[max(first - offsets[0], 0) : max(last - offsets[0], 0)]
                if found is None:
                    found = torch.empty((stop - start, *self._shapes[name][1:]), dtype=box.dtype)
                if last > first:
                    inner = tuple(slice(at, at + size) for at, size in zip(offsets[1:], shape[1:], strict=True))
                    found[(slice(first - start, last - start), *inner)] = box
        assert found is not None
        return found

    def __getitem__(self, name: str) -> Tensor:
        boxes = self._boxes[name]
        if len(boxes) > 1:
            return self.rows(name, 0, self._shapes[name][0])
        with safe_open(boxes[0][0], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)
