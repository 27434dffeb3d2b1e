"""The benchmarks' energy meter, on a counter that moves in steps as NVML's does."""

import time
from types import SimpleNamespace

import pytest
import torch
from benchmarks.energy import Meter, Nvml

from stoker.compose import nvml


class Counter:
    """So many watts, shown in steps of so many seconds."""

    def __init__(self, watts, step):
        self._watts, self._step = watts, step

    def joules(self):
        return self._watts * self._step * (time.perf_counter() // self._step)

    def megahertz(self):
        return 1500.0


def test_power_is_that_between_the_counters_steps():
    with Meter(Counter(600.0, 0.04)) as meter:
        time.sleep(0.5)
    # A step is seen up to a sample late, of some 5 ms; over 0.4 s that is little.
    assert meter.watts == pytest.approx(600.0, rel=0.05)
    assert meter.mhz == 1500.0


def test_too_few_steps_give_no_power():
    with Meter(Counter(600.0, 10.0)) as meter:
        time.sleep(0.05)
    assert meter.watts is None


def library(millijoules=1500, clock=1980):
    """NVML with one device; with no `millijoules`, without a counter."""

    def answers(pointer, value):
        pointer._obj.value = value
        return 0

    return SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByUUID=lambda uuid, device: answers(device, {b"GPU-aa11": 7}[uuid]),
        nvmlDeviceGetTotalEnergyConsumption=lambda device, value: (
            3 if millijoules is None else answers(value, millijoules)
        ),
        nvmlDeviceGetClockInfo=lambda device, kind, value: answers(value, clock),
    )


def test_counters_are_those_of_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="aa11"))
    monkeypatch.setattr(nvml, "_library", library)
    assert (Nvml().joules(), Nvml().megahertz()) == (1.5, 1980.0)
    monkeypatch.setattr(nvml, "_library", lambda: library(millijoules=None))
    with pytest.raises(nvml.Unanswered, match="nvmlDeviceGetTotalEnergyConsumption failed with code 3"):
        Nvml()
