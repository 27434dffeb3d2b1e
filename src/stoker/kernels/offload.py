"""Activations in pinned host memory while the GPU does not need them.

Copies run on a stream of their own, beside the compute: a layer's tensors leave while the next layers compute, and come
back, one layer ahead, while the layers after it run their backward. At 50 GB/s the 64 MB that 8,192 tokens of width
4,096 take each way need 1.3 ms, a layer of an 8B model some 5 ms of compute (H200).

Where copies take longer than a layer's compute, the compute would wait for them. If the last layers keep theirs on the
device, copies may lag: what is late lies, until those layers run, in the memory that they will need.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.kernels.ahead import is_compiling_ahead
from stoker.kernels.pinned import empty_pinned

# Copies that may always be under way: tensors of the layer before are still leaving while this one's are handed over.
MAX_LEAVING = 4


@dataclass
class _Entry:
    """A stored tensor: its host copy, its shape, and its copy on the device once that is on its way."""

    host: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    back: Tensor | None = None
    arrived: Any = None


class HostOffload:
    """Stores tensors on the host under ascending handles and fetches them, best in descending order.

    `prefetch` is how many of the handles just below a fetched one are brought along. Host buffers are kept and used
    again, so that the pinned memory is that of the largest step. Tensors below `min_bytes` are not worth a copy of
    their own. Of the tensors that have not left yet, all but the newest `MAX_LEAVING` may take `spare_bytes` of the
    device, less what `stay` was told since. On a CPU it only copies: the logic, not the effect.
    """

    def __init__(self, *, prefetch: int = 3, min_bytes: int = 2**20, spare_bytes: int = 0) -> None:
        self._prefetch = prefetch
        self._min_bytes = min_bytes
        self.spare_bytes = self._left_to_spare = spare_bytes
        self._entries: dict[int, _Entry] = {}
        self._next = 0
        self._free: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._streams: dict[torch.device, Any] = {}

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held, in use or ready to be used again."""
        buffers = [entry.host for entry in self._entries.values()] + [b for free in self._free.values() for b in free]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    @property
    def num_stored(self) -> int:
        """Tensors stored and not yet released."""
        return len(self._entries)

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is large enough and, lying in memory without gaps, can be stored.

        None is in a rehearsal (`kernels.ahead`): it would leave pinned buffers of sizes that no step asks for.
        """
        if is_compiling_ahead():
            return False
        return _num_bytes(tensor) >= self._min_bytes and is_dense(tensor)

    def store(self, tensor: Tensor) -> int:
        """Starts moving `tensor` to the host and returns its handle; the caller drops its own references.

        Raises ValueError unless the tensor fills its memory without gaps (see `is_dense`).
        """
        if not is_dense(tensor):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} has gaps")
        free = self._free.get((tensor.dtype, tensor.numel()), [])
        host = free.pop() if free else _host_buffer(tensor)
        entry = _Entry(host, tensor.shape, tensor.stride(), tensor.device)
        if tensor.is_cuda:
            self._copy_out(tensor, host)
        else:
            host.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        handle, self._next = self._next, self._next + 1
        self._entries[handle] = entry
        return handle

    def stay(self, num_bytes: int) -> None:
        """Says that a layer keeps `num_bytes` on the device, which are spare no longer; with the last of them
        everything has left."""
        self._left_to_spare = max(0, self._left_to_spare - num_bytes)
        self._make_room(0 if self._left_to_spare == 0 else MAX_LEAVING)

    def bring(self) -> None:
        """Starts to bring back what was stored last, which is needed first."""
        if self._entries:
            self._bring(max(self._entries))

    def _bring(self, newest: int) -> None:
        self._left_to_spare = self.spare_bytes  # no forward is under way
        for wanted in range(newest, newest - self._prefetch - 1, -1):
            if wanted in self._entries:
                self._copy_back(self._entries[wanted])

    def fetch(self, handle: int) -> Tensor:
        """Returns the stored tensor on its device, with its shape and strides; also after an earlier `fetch`."""
        self._bring(handle)
        entry = self._entries[handle]
        if entry.arrived is not None:
            torch.cuda.current_stream(entry.device).wait_event(entry.arrived)
        if entry.back is None:
            raise RuntimeError(f"handle {handle} was not brought back")
        return entry.back

    def release(self, handle: int) -> None:
        """Forgets a stored tensor; its host buffer is used again."""
        entry = self._entries.pop(handle)
        self._free.setdefault((entry.host.dtype, entry.host.numel()), []).append(entry.host)

    def clear(self) -> None:
        """Releases everything, as after a step that was broken off."""
        self._leaving.clear()
        self._left_to_spare = self.spare_bytes
        for handle in list(self._entries):
            self.release(handle)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _copy_out(self, tensor: Tensor, host: Tensor) -> None:
        current, side = torch.cuda.current_stream(tensor.device), self._stream(tensor.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            host.as_strided(tensor.shape, tensor.stride()).copy_(tensor, non_blocking=True)
            done = side.record_event()
        # The tensor's memory must not be given to others before it has left; a few at a time wait for that.
        self._leaving.append((tensor, done))
        self._make_room(MAX_LEAVING)

    def _make_room(self, count: int) -> None:
        """Waits for tensors to leave until those before the newest `count` take no more than is spare."""
        late = sum(_num_bytes(tensor) for tensor, _ in list(self._leaving)[: max(0, len(self._leaving) - count)])
        while len(self._leaving) > count and late > self._left_to_spare:
            tensor, left = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(left)
            late -= _num_bytes(tensor)

    def _copy_back(self, entry: _Entry) -> None:
        if entry.back is not None:
            return
        entry.back = torch.empty_strided(entry.shape, entry.stride, dtype=entry.host.dtype, device=entry.device)
        source = entry.host.as_strided(entry.shape, entry.stride)
        if entry.device.type != "cuda":
            entry.back.copy_(source)
            return
        # In the backward nothing leaves any more: the last tensors of the forward are freed.
        while self._leaving:
            _, left = self._leaving.popleft()
            torch.cuda.current_stream(entry.device).wait_event(left)
        side = self._stream(entry.device)
        side.wait_stream(torch.cuda.current_stream(entry.device))  # who used this memory before is done
        with torch.cuda.stream(side):
            entry.back.copy_(source, non_blocking=True)
            entry.arrived = side.record_event()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _host_buffer(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        return empty_pinned(tensor.numel(), tensor.dtype)
    return torch.empty(tensor.numel(), dtype=tensor.dtype)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill a block of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
