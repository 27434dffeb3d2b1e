"""Which rank writes what of tensors that ranks hold whole or in parts: planned by torch's distributed checkpoint.

Its planner lets each part be written once, also where several ranks hold the same, and deals those out evenly; that the
parts make up the whole tensors is checked. Files and their format are ours (`tensors`, `manifest`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.tensor import DTensor

Gather = Callable[[Any], list[Any]]
"""Every rank's value, in their order; every rank must call it."""

_SEPARATOR = "\n"


@dataclass(frozen=True)
class Piece:
    """A tensor, or the box of it that begins at `offsets` in a tensor of shape `whole`."""

    tensor: Tensor
    offsets: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether there is no more of it elsewhere."""
        return tuple(self.tensor.shape) == self.whole


Pieces = dict[str, dict[str, Piece]]
"""By group and name."""


def whole(tensors: Mapping[str, Mapping[str, Tensor]]) -> Pieces:
    """Returns whole tensors, by group and name, as pieces."""
    return {
        group: {name: Piece(tensor, (0,) * tensor.dim(), tuple(tensor.shape)) for name, tensor in named.items()}
        for group, named in tensors.items()
    }


def assign(tensors: Mapping[str, Mapping[str, Tensor]], *, rank: int, world_size: int, gather: Gather) -> Pieces:
    """Returns what this rank is to write of `tensors`, by group and name; every rank must call it.

    A tensor that is no DTensor is taken to be the same on every rank that has it.
    """
    if world_size == 1:
        return whole({group: {name: _held(one) for name, one in named.items()} for group, named in tensors.items()})
    flat = {f"{group}{_SEPARATOR}{name}": one for group, named in tensors.items() for name, one in named.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(flat, is_coordinator=rank == 0)
    plans, _ = planner.create_global_plan(gather(planner.create_local_plan()))
    pieces: Pieces = {}
    for item in planner.finish_plan(plans[rank]).items:
        data = item.tensor_data
        assert data is not None, "tensors alone are planned"
        if not data.chunk.sizes.numel() and data.size.numel():
            continue  # a rank without rows
        group, _, name = item.index.fqn.partition(_SEPARATOR)
        held = _held(flat[item.index.fqn])
        pieces.setdefault(group, {})[name] = Piece(held, tuple(data.chunk.offsets), tuple(data.size))
    return pieces


class HostCopies:
    """Copies of tensors in host memory, so that steps may change the tensors while the copies are written.

    Memory is kept from one checkpoint to the next: pinned memory, which a GPU copies to at full speed, is slow to get.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def of(self, pieces: Pieces) -> Pieces:
        """Returns the pieces as they are now; the copies are valid until the next call."""
        copies: Pieces = {}
        for group, named in pieces.items():
            for name, piece in named.items():
                copied = Piece(self._copy((group, name), piece.tensor.detach()), piece.offsets, piece.whole)
                copies.setdefault(group, {})[name] = copied
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor, non_blocking=True)


def num_bytes(pieces: Pieces) -> int:
    """Returns the bytes of all tensors."""
    return sum(piece.tensor.nbytes for named in pieces.values() for piece in named.values())


def _held(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
