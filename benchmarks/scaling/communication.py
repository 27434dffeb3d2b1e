"""How long the GPU of a rank spends in collectives during one step, by PyTorch's profiler."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

Span = tuple[float, float]


def watched(step: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Takes one step under the profiler; returns its times in milliseconds, None without a GPU.

    `collectives`: in which a kernel of NCCL ran; it waits in there for slower ranks too. `exposed`: those of them in
    which nothing else ran, which is what a step without communication would save. `busy`: in which any kernel ran.
    """
    if device.type != "cuda":
        step()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize(device)
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in recorded.events() if _ran(event)]
    return times(spans)


def _ran(event: Any) -> bool:
    on_device = event.device_type == torch.autograd.DeviceType.CUDA
    # Names of host calls and of annotations ("nccl:all_reduce") span kernels, and are none themselves.
    return (
        on_device
        and not event.name.startswith(("cuda", "nccl:", "ProfilerStep", "## "))
        and not event.is_user_annotation
    )


def times(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Returns the three times of `watched` from kernels' names, starts and ends in microseconds."""
    found = list(kernels)
    collectives = merged((start, end) for name, start, end in found if "nccl" in name.lower())
    others = merged((start, end) for name, start, end in found if "nccl" not in name.lower())
    busy = merged([*collectives, *others])
    return {
        "collectives": total(collectives) / 1e3,
        "exposed": (total(busy) - total(others)) / 1e3,
        "busy": total(busy) / 1e3,
    }


def merged(spans: Iterable[Span]) -> list[Span]:
    """Returns the union of `spans` as spans that do not touch, in their order."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def total(spans: Iterable[Span]) -> float:
    """Returns the length of spans that do not overlap."""
    return sum(end - start for start, end in spans)
