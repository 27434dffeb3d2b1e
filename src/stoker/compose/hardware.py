"""Looks at the machine: which devices PyTorch can train on, and what is free on them."""

import importlib.util
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.compose import nvml
from stoker.plan import catalogue
from stoker.plan.hardware import Device, Hardware

if TYPE_CHECKING:
    from stoker.models.open import Model

# What a CUDA context takes, which a run has made by the time that it asks what is free.
_CONTEXT_BYTES = 2**29
_TRITON_FROM = (7, 0)  # Volta
# Where PyTorch's version.py says what it was built for, one name a line: cuda: Optional[str] = '13.0'.
_BUILT_FOR = re.compile(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]", re.MULTILINE)


def look() -> Hardware:
    """Returns what `probe` does, from the driver and the system where they tell all of it, without PyTorch.

    They do of NVIDIA's GPUs that the catalogue has, and of a CPU where PyTorch is built for nothing else.
    """
    found = _told()
    return probe() if found is None else found


def _told() -> Hardware | None:
    """What driver and system tell; None where only PyTorch knows."""
    built = _built_for()
    is_interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    if built is None or built - {"cuda"} or is_interpreted or platform.system() == "Darwin":
        return None
    threads = _threads()
    processor = replace(host(), name=_name(threads))
    if not built:
        return Hardware((processor,), num_threads=threads)
    found = nvml.gpus()
    shown = nvml.visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    # CUDA puts the fastest first unless told otherwise, NVML goes by slots.
    is_ordered = len({one.name for one in found}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not shown or not is_ordered or shown[0].is_divided:
        return None
    gpu = device_of(shown[0])
    is_known = catalogue.by_name(gpu.name, catalogue.shipped()) is not None
    return Hardware((gpu, processor), num_threads=threads) if is_known else None


def gpus_here() -> tuple[Device, ...]:
    """Returns this machine's NVIDIA GPUs that CUDA_VISIBLE_DEVICES shows, as the driver tells.

    The process that starts others must not open a CUDA context, which would take memory of the first GPU.
    """
    found = nvml.visible(nvml.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return tuple(device_of(one) for one in found)


def device_of(gpu: nvml.Gpu) -> Device:
    """Returns a GPU as a run sees it, whose context has its part of the memory."""
    has_triton = importlib.util.find_spec("triton") is not None
    return Device(
        "cuda",
        gpu.name,
        max(0, gpu.free_bytes - _CONTEXT_BYTES),
        bf16=gpu.compute_capability >= (8, 0),
        compute_capability=gpu.compute_capability,
        triton=has_triton and gpu.compute_capability >= _TRITON_FROM,
    )


def _built_for() -> set[str] | None:
    """What the PyTorch that is installed was built for besides CPUs; None where that is not to be found."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    return set(_BUILT_FOR.findall(text))


def _threads() -> int:
    """How many threads PyTorch would take: the physical cores that the process may use, or OMP_NUM_THREADS of them."""
    import psutil

    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def _name(threads: int) -> str:
    return f"CPU ({platform.machine()}, {threads} threads)"


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
    devices.append(Device("cpu", _name(threads), psutil.virtual_memory().available, bf16=True, triton=_interprets()))
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

    return triton_support.available() and (capability is None or capability >= _TRITON_FROM)


def _interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, and so on a CPU too; only tests want that."""
    from stoker.kernels import triton_support

    return triton_support.available() and bool(triton_support.triton.knobs.runtime.interpret)
