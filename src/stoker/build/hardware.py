"""Looks at the machine: which devices PyTorch can train on, and what is free on them."""

import platform

from stoker.plan.hardware import Device, Hardware


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
    devices.append(Device("cpu", name, psutil.virtual_memory().available, bf16=True))
    return Hardware(tuple(devices), num_threads=threads)


def _gpu(index: int) -> Device:
    import torch

    free, _ = torch.cuda.mem_get_info(index)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", torch.cuda.get_device_name(index), free, bf16=bf16)
