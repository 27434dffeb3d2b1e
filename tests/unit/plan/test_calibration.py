import json
from dataclasses import replace

import pytest

from stoker.plan import calibration, rates
from stoker.plan.calibration import Calibration
from stoker.plan.hardware import Device
from stoker.plan.links import Links

H200 = Device("cuda", "NVIDIA H200", 140 * 10**9, bf16=True, compute_capability=(9, 0), triton=True)


@pytest.fixture(autouse=True)
def machine_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    return tmp_path


def measured(**changes):
    one = Calibration(
        device="NVIDIA H200",
        host=calibration.platform.node(),
        date="2026-11-25",
        products={"fp32": 50e12, "bf16": 790e12},
        copy=4.16e12,
        attention=426e12,
        attention_dtype="bf16",
        call_seconds=5e-6,
        to_device=50e9,
        to_host=40e9,
        disk_read=2e9,
        collectives={"2": {"bus_bytes_per_second": 300e9, "latency_seconds": 2e-5}},
    )
    return replace(one, **changes)


def test_a_calibration_takes_the_place_of_the_catalogue_and_says_so():
    before = rates.of(H200)
    calibration.save(measured())
    after = rates.of(H200)
    assert "rules of thumb" in before.efficiencies.source
    assert after.efficiencies.source == "rates measured here on 2026-11-25 (stoker doctor --calibrate)"
    assert after.device.rates["bf16"] == 790e12
    assert after.device.bandwidth == 4.16e12
    assert after.device.host_link * after.efficiencies.host_link == 40e9
    assert after.efficiencies.load_bandwidth == 2e9
    assert Links.of(after.device).device == pytest.approx(300e9)


def test_the_figures_of_an_h200_give_the_shares_that_were_measured_inside_its_steps():
    calibration.save(measured())
    before, after = rates.of(replace(H200, name="H200")), rates.of(H200)
    for name, rate in (("matmul", "bf16"), ("attention", "bf16")):
        ours = getattr(after.efficiencies, name) * after.device.rates[rate]
        assert ours == pytest.approx(getattr(before.efficiencies, name) * before.device.rates[rate], rel=0.01)
    ours = after.efficiencies.bandwidth * after.device.bandwidth
    assert ours == pytest.approx(before.efficiencies.bandwidth * before.device.bandwidth, rel=0.01)
    assert after.efficiencies.layer_launch_seconds == pytest.approx(before.efficiencies.layer_launch_seconds)


@pytest.mark.parametrize("change", [{"device": "Tesla T4"}, {"host": "elsewhere"}, {"form": 0}, {"copy": 0.0}])
def test_a_calibration_of_something_else_is_not_used(change):
    path = calibration.save(measured())
    facts = json.loads(path.read_text()) | change
    path.write_text(json.dumps(facts))
    assert calibration.load("NVIDIA H200") is None
    assert "rules of thumb" in rates.of(H200).efficiencies.source


def test_a_torn_calibration_is_not_used():
    path = calibration.save(measured())
    path.write_text(path.read_text()[:100])
    assert calibration.load("NVIDIA H200") is None


def test_a_measured_figure_that_was_not_taken_leaves_the_catalogues():
    calibration.save(measured(to_device=0.0, to_host=0.0, disk_read=0.0, collectives={}))
    before, after = rates.of(replace(H200, name="H200")), rates.of(H200)
    assert after.device.host_link == before.device.host_link
    assert after.device.device_link == before.device.device_link
    assert after.efficiencies.load_bandwidth == before.efficiencies.load_bandwidth
