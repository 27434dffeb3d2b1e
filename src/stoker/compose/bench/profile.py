"""Where a step's time goes: the device's kernels (operators on a CPU), summed by name."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from stoker.errors import OutputError

SHOWN = 30
_NAME_CHARACTERS = 90


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a step: its name, how many, and their milliseconds."""

    name: str
    calls: int
    milliseconds: float


def profiled(step: Callable[[], object], device: torch.device) -> tuple[KernelTime, ...]:
    """Runs `step` once under PyTorch's profiler; returns its kernels, the longest first."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = []
    for event in recorded.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0 and not event.key.startswith(("cuda", "ProfilerStep")):
            found.append(KernelTime(event.key, event.count, microseconds / 1e3))
    return tuple(sorted(found, key=lambda one: -one.milliseconds))


def table(kernels: Sequence[KernelTime], step_seconds: float) -> Table:
    """Returns the longest `SHOWN` kernels as a table, with their share of a step of `step_seconds`."""
    total = sum(one.milliseconds for one in kernels)
    shown = Table(
        box=None,
        header_style="bold",
        pad_edge=False,
        title=f"one step by kernel: {total:,.1f} ms, {total / step_seconds / 1e3:.0%} of a step by the clock",
        title_justify="left",
    )
    for name in ("ms", "calls", "of all"):
        shown.add_column(name, justify="right")
    shown.add_column("kernel", no_wrap=True)
    for one in kernels[:SHOWN]:
        shown.add_row(
            f"{one.milliseconds:,.2f}", str(one.calls), f"{one.milliseconds / total:.1%}", one.name[:_NAME_CHARACTERS]
        )
    if rest := kernels[SHOWN:]:
        milliseconds, calls = sum(one.milliseconds for one in rest), sum(one.calls for one in rest)
        shown.add_row(f"{milliseconds:,.2f}", str(calls), f"{milliseconds / total:.1%}", f"{len(rest)} others")
    return shown


def write(kernels: Sequence[KernelTime], path: Path) -> None:
    """Writes every kernel to a CSV file.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["name", "calls", "milliseconds"])
            writer.writeheader()
            writer.writerows(asdict(one) for one in kernels)
    except OSError as error:
        raise OutputError(f"--profile {path} cannot be written: {error.strerror}.") from error
