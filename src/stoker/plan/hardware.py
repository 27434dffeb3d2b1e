"""What a machine has, as plain records: `compose` probes it, the plan only reads it."""

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Device:
    """A device that PyTorch can train on; `memory_bytes`: free for a run; `bf16`: whether it computes in bf16.

    `compute_capability` is an NVIDIA GPU's, (9, 0) for Hopper, and None elsewhere. `triton`: whether Triton's kernels
    run on it (on a CPU: under Triton's interpreter, as in tests). `multiprocessors`, their `clock_hz` and the memory's
    `bandwidth` in bytes a second are what a GPU's driver reports, 0 where it does not.
    """

    kind: DeviceKind
    name: str
    memory_bytes: int
    bf16: bool = False
    compute_capability: tuple[int, int] | None = None
    triton: bool = False
    multiprocessors: int = 0
    clock_hz: float = 0.0
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """A machine: its devices, the CPU among them, and how many threads its physical cores allow."""

    devices: tuple[Device, ...]
    num_threads: int = 1

    def first(self, kind: DeviceKind) -> Device | None:
        """Returns the first device of a kind, or None."""
        return next((device for device in self.devices if device.kind == kind), None)
