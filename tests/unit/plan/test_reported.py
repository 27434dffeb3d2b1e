from dataclasses import replace

import pytest

from stoker.plan.catalogue import shipped
from stoker.plan.hardware import Device
from stoker.plan.reported import figures

GIB = 2**30
# Multiprocessors and boost clocks in MHz by the data sheets.
KNOWN = {
    "v100": (80, 1530),
    "t4": (40, 1590),
    "a100-80": (108, 1410),
    "a10": (72, 1695),
    "rtx3090": (82, 1695),
    "rtx4090": (128, 2520),
    "l40s": (142, 2490),
    "h100": (132, 1830),
    "rtx5090": (170, 2407),
}


@pytest.mark.parametrize("key", KNOWN)
def test_rates_from_clocks_are_those_of_the_data_sheet(key):
    one = shipped()[key]
    multiprocessors, clock = KNOWN[key]
    device = replace(one.device(), multiprocessors=multiprocessors, clock_hz=1e6 * clock, bandwidth=one.bandwidth)
    found = figures(device, shipped()["t4"])
    for dtype in one.rates:
        # An H100's fp32 is given at a higher clock than its matrix units.
        assert found.rates[dtype] == pytest.approx(one.rates[dtype], rel=0.08 if dtype == "fp32" else 0.03), dtype
    assert found.bandwidth == one.bandwidth
    assert found.bf16 == one.bf16
    assert found.price is None


def test_without_clocks_or_capability_nothing_is_reckoned():
    device = Device("cuda", "a card", GIB, compute_capability=(9, 0), multiprocessors=10, clock_hz=1e9)
    like = shipped()["h100"]
    assert figures(device, like).bandwidth == like.bandwidth
    assert "bandwidth of H100" in figures(device, like).source
    for change in ({"multiprocessors": 0}, {"clock_hz": 0.0}, {"compute_capability": None}):
        assert figures(replace(device, **change), like) is None
    assert figures(replace(device, compute_capability=(5, 2)), like) is None


def test_a_generation_to_come_has_the_rates_of_the_one_before():
    device = Device("cuda", "a card", GIB, compute_capability=(12, 1), multiprocessors=10, clock_hz=1e9)
    assert figures(device, shipped()["h100"]).rates["bf16"] == 1024 * 10e9
