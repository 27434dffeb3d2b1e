"""Time and energy of GPU work that runs for seconds on end: the GPU's clock, NVML's energy counter and SM clock."""

from __future__ import annotations

import ctypes
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from stoker.compose.nvml import ask, opened

LEAD_SECONDS = 0.3
"""Work before a measurement: by then the power limit has set the clock."""
_SAMPLE_SECONDS = 0.005
_SM_CLOCK = 1


class Power(NamedTuple):
    """Of one call: its milliseconds and joules; meanwhile the card's watts and the SM clock in MHz.

    None where NVML has no counter, or gave too few values in the time.
    """

    ms: float
    joules: float | None = None
    watts: float | None = None
    mhz: float | None = None


class Nvml:
    """NVML's counters of the current CUDA device; `Unanswered` where the library or the device refuses."""

    def __init__(self) -> None:
        self._library = opened()
        self._device = ctypes.c_void_p()
        uuid = f"GPU-{str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix('GPU-')}"
        ask(self._library, "nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))
        self.joules()

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        value = ctypes.c_ulonglong()
        ask(self._library, "nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(value))
        return value.value / 1e3

    def megahertz(self) -> float:
        """The SM clock now."""
        value = ctypes.c_uint()
        ask(self._library, "nvmlDeviceGetClockInfo", self._device, _SM_CLOCK, ctypes.byref(value))
        return float(value.value)


class Meter:
    """Samples the counters in a thread while its block runs."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml, self._done = nvml, threading.Event()
        self._ticks: list[tuple[float, float]] = []
        self._clocks: list[float] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            joules, now = self._nvml.joules(), time.perf_counter()
            # The driver renews the counter some ten to fifty times a second: only where it moves is its time known.
            if not self._ticks or joules != self._ticks[-1][1]:
                self._ticks.append((now, joules))
            self._clocks.append(self._nvml.megahertz())

    @property
    def watts(self) -> float | None:
        """Power by the line through the counter's steps, the first of which began before."""
        ticks = self._ticks[1:]
        return statistics.linear_regression(*zip(*ticks, strict=True)).slope if len(ticks) >= 4 else None

    @property
    def mhz(self) -> float | None:
        """Median clock."""
        return statistics.median(self._clocks) if self._clocks else None


def captured(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Returns a replay of a CUDA graph of `runs`, one after the other: Python's launches must not count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def sustained(runs: Sequence[Callable[[], object]], *, seconds: float, nvml: Nvml | None, lead: float) -> Power:
    """Runs the calls in turn for `seconds`, after `lead` seconds of the same; the result is that of one call."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for run in runs:
            run()
        return Power((time.perf_counter() - begin) * 1e3 / len(runs))
    replay = captured(runs)
    replay()
    round_ms = _milliseconds(replay, 1)
    for _ in range(math.ceil(lead * 1e3 / round_ms)):
        replay()
    count = math.ceil(seconds * 1e3 / round_ms)
    if nvml is None:
        return Power(_milliseconds(replay, count) / len(runs))
    with Meter(nvml) as meter:
        ms = _milliseconds(replay, count) / len(runs)
    watts = meter.watts
    return Power(ms, None if watts is None else watts * ms / 1e3, watts, meter.mhz)


def _milliseconds(run: Callable[[], object], count: int) -> float:
    """Time of one of `count` runs by the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count
