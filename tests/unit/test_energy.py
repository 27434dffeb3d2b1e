"""The benchmarks' energy meter, on a counter that moves in steps as NVML's does."""

import time

import pytest
from benchmarks.energy import Meter


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
