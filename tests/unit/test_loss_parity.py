"""The loss-parity benchmark: what it compares, and that it notices a difference."""

import csv
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from benchmarks import loss_parity
from benchmarks.curves import svg


def test_every_counterpart_runs_before_what_is_compared_with_it():
    ways = [*loss_parity.cpu_ways(), *loss_parity.gpu_ways()]
    names = [way.name for way in ways]
    assert len(set(names)) == len(names)
    for index, way in enumerate(ways):
        assert (way.trainer == "hf") == (not way.counterpart)
        assert not way.counterpart or way.counterpart in names[:index]
        assert not way.counterpart or 0 < way.bound <= 0.01


def test_a_difference_is_that_of_smoothed_curves():
    base = [1.0] * 60
    noisy = [1.0 + 0.1 * (-1) ** step for step in range(60)]
    assert loss_parity.difference(noisy, base) < 1e-12
    assert math.isclose(loss_parity.difference([1.1] * 60, base), 0.1)
    late = [*base[:40], *[1.2] * 20]
    assert math.isclose(loss_parity.difference(late, base), 0.2)
    assert np.allclose(loss_parity.smoothed([1.0, 3.0]), [2.0])


def test_a_way_must_be_within_both_its_bounds():
    way = loss_parity.Way("fp8", counterpart="bf16", bound=0.1, mean_bound=0.01)
    base = [1.0] * 60
    assert loss_parity.compared(way, {"bf16": base, "fp8": [1.005] * 60})["is_within"]
    assert not loss_parity.compared(way, {"bf16": base, "fp8": [1.02] * 60})["is_within"]
    early = [*[1.15] * 30, *[0.85] * 30]  # the same mean, but another curve
    found = loss_parity.compared(way, {"bf16": base, "fp8": early})
    assert found["mean_difference"] < 1e-12
    assert not found["is_within"]


@pytest.mark.slow
def test_curves_are_compared_and_written(tmp_path, monkeypatch):
    arguments = ["loss_parity", "--steps", "3", "--only", "nf4", "--device", "cpu", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--commit", "abc", "--processes", "2"])
    assert loss_parity.main() == 0
    facts = json.loads((tmp_path / "loss_parity_cpu.json").read_text())
    assert facts["commit"] == "abc"
    assert [line["way"] for line in facts["comparisons"]] == ["nf4 fp32"]
    with (tmp_path / "loss_parity_cpu.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3
    assert float(lines[0]["nf4 fp32"]) == pytest.approx(float(lines[0]["hf fp32 on nf4 weights"]), abs=1e-5)
    assert (tmp_path / "loss_parity_cpu.svg").read_text().count("<polyline") == 2


@pytest.mark.slow
def test_what_is_too_far_fails(tmp_path, monkeypatch):
    arguments = ["loss_parity", "--steps", "2", "--only", "reference fp32", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*arguments, "--results", str(tmp_path)])
    run = loss_parity.run_stoker
    monkeypatch.setattr(loss_parity, "run_stoker", lambda way, job: [1.01 * loss for loss in run(way, job)])
    assert loss_parity.main() == 1


def test_the_picture_is_valid_and_holds_every_point():
    picture = svg({"a < b": [3.0, 2.0, 1.0], "c": [3.0, 2.5, 2.0]}, title="t & u")
    root = ET.fromstring(picture)
    lines = root.findall("{*}polyline")
    assert [len(line.get("points").split()) for line in lines] == [3, 3]
    heights = [float(point.split(",")[1]) for point in lines[0].get("points").split()]
    assert heights == sorted(heights)  # a falling curve goes down, where SVG's y grows
