"""What the rehearsal of a first step took, and the parameters that its update is rehearsed on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

_SIDE = 128
# An 8-bit optimiser steps tensors of fewer values as others do.
_LARGE = 4096


@dataclass(frozen=True)
class Rehearsal:
    """Seconds of asking for kernels, in a small step that loads libraries, then until all are there.

    `num_kernels`: asked for, compiled on `num_threads` or read from the cache on disk.
    """

    asking_seconds: float
    waiting_seconds: float
    num_kernels: int
    num_threads: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.asking_seconds + self.waiting_seconds

    def describe(self) -> str:
        """Returns it in words, for a line about the first step."""
        return (
            f"{self.seconds:.1f} s of rehearsal: {self.asking_seconds:.1f} asking for {self.num_kernels} kernels, "
            f"{self.waiting_seconds:.1f} more until {self.num_threads} threads had them"
        )


def stand_ins(trained: Mapping[str, nn.Parameter], device: torch.device) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields small parameters with a gradient of zeros, for each kind of those in `trained`, under the name of one.

    A kind is what a kernel is compiled for or an optimiser tells apart: the dtype, whether it is a matrix, whether it
    is large, and whether 16 divides its values.
    """
    known = set()
    for name, parameter in trained.items():
        is_large, is_even = parameter.numel() >= _LARGE, parameter.numel() % 16 == 0
        kind = (parameter.dtype, parameter.ndim > 1, is_large, is_even)
        if kind in known:
            continue
        known.add(kind)
        rows, columns = (_SIDE, _SIDE) if is_large else (4, 4)
        if not is_even:
            rows, columns = rows + 1, columns + 1
        shape = (rows, columns) if parameter.ndim > 1 else (rows * columns,)
        one = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=device))
        one.grad = torch.zeros_like(one)
        yield name, one
