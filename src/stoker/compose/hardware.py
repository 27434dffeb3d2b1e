"""Looks at the machine: which devices PyTorch can train on, and what is free on them."""

import platform
from dataclasses import replace
from typing import TYPE_CHECKING

from stoker.plan.hardware import Device, Hardware

if TYPE_CHECKING:
    from stoker.models.open import Model


def probe() -> Hardware:
    """Returns this machine's devices with the memory that is free now, and how many threads its cores allow."""
    import psutil
    import torch

    devices = [_gpu(torch.cuda.current_device())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        # An Apple GPU shares the machine's memory; PyTorch lets it have a recommended part of it.
        limit = torch.mps.recommended_max_memory()
        devices.append(Device("mps", "Apple GPU", min(limit, psutil.virtual_memory().available)))
    # As many as PyTorch chose: the physical cores, or what OMP_NUM_THREADS and the process's affinity allow.
    threads = torch.get_num_threads()
    name = f"CPU ({platform.machine()}, {threads} threads)"
    devices.append(Device("cpu", name, psutil.virtual_memory().available, bf16=True, triton=_interprets()))
    return Hardware(tuple(devices), num_threads=threads)


def host() -> Device:
    """Returns the host as a device, with the memory that is free now; asks no PyTorch."""
    import psutil

    return Device("cpu", f"CPU ({platform.machine()})", psutil.virtual_memory().available, bf16=True)


def with_loaded(hardware: Hardware, decoder: "Model") -> Hardware:
    """Returns the hardware as if a model that is loaded already were not: the plan of its run counts its weights."""
    held: dict[str, int] = {}
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        held[tensor.device.type] = held.get(tensor.device.type, 0) + tensor.nbytes
    devices = (replace(one, memory_bytes=one.memory_bytes + held.get(one.kind, 0)) for one in hardware.devices)
    return replace(hardware, devices=tuple(devices))


def _gpu(index: int) -> Device:
    import torch

    free, _ = torch.cuda.mem_get_info(index)
    # What earlier work of this process (in a notebook) left in PyTorch's cache is free for it to use again.
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    # AMD's GPUs answer to the same calls; their numbers mean something else.
    capability = None if torch.version.hip else torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    properties = torch.cuda.get_device_properties(index)
    # Double data rate; PyTorch gives clocks in kHz and the bus in bits, where it gives them.
    lanes = getattr(properties, "memory_bus_width", 0) / 8
    return Device(
        "cuda",
        name,
        free,
        bf16=bf16,
        compute_capability=capability,
        triton=_compiles(capability),
        multiprocessors=properties.multi_processor_count,
        clock_hz=1e3 * getattr(properties, "clock_rate", 0),
        bandwidth=2e3 * getattr(properties, "memory_clock_rate", 0) * lanes,
    )


def _compiles(capability: tuple[int, int] | None) -> bool:
    """Whether Triton is there and compiles for such a GPU: Volta or later."""
    from stoker.kernels import triton_support

    return triton_support.available() and (capability is None or capability >= (7, 0))


def _interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, and so on a CPU too; only tests want that."""
    from stoker.kernels import triton_support

    return triton_support.available() and bool(triton_support.triton.knobs.runtime.interpret)
