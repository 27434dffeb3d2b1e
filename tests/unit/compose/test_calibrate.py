import dataclasses
import time

import pytest
import torch
from typer.testing import CliRunner

from stoker.cli.main import app
from stoker.compose import calibrate
from stoker.errors import ConfigError, OutputError
from stoker.plan import calibration, catalogue

TINY = calibrate.Sizes(product=32, copy_mib=1, tokens=16, disk_mib=16, calls=20, collective_mib=1)


@pytest.fixture(autouse=True)
def machine_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate.Sizes, "of", classmethod(lambda cls, kind: TINY))


@pytest.mark.slow
def test_the_command_measures_keeps_and_the_plan_says_so(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--calibrate", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in ("products in fp32", "attention", "memory", "a launch", "disk"):
        assert f"  {name}" in result.output
    here = calibrate.probe()
    device = here.first("cuda") or here.first("cpu")
    found = calibration.load(device.name)
    assert all(rate > 0 for rate in (*found.products.values(), found.copy, found.attention, found.disk_read))
    assert found.versions["torch"]
    assert not list(tmp_path.glob(".stoker-disk*"))
    planned = CliRunner().invoke(app, ["plan", "examples/quickstart.yaml", "--here"])
    assert f"Efficiencies: {found.source}." in planned.output
    assert "calibration-" in CliRunner().invoke(app, ["doctor"]).output.replace("\n", "")


def test_a_disk_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/below cannot be measured"):
        calibrate.calibrate(tmp_path / "file" / "below", sizes=TINY, say=lambda _: None)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "file" / "below"))
    result = CliRunner().invoke(app, ["doctor", "--calibrate", "--folder", str(tmp_path)])
    assert isinstance(result.exception, OutputError)
    assert "STOKER_CACHE" in str(result.exception)
    assert "measuring" not in result.output


def test_gpus_without_calibrate_are_refused():
    with pytest.raises(ConfigError, match="--calibrate"):
        raise CliRunner().invoke(app, ["doctor", "--gpus", "2"]).exception


@pytest.mark.slow
def test_collectives_are_measured_over_processes(tmp_path):
    lines = []
    found = calibrate.calibrate(tmp_path, num_gpus=2, sizes=TINY, say=lines.append)
    assert found.collectives["2"]["bus_bytes_per_second"] > 0
    assert any("collectives over 2" in line for line in lines)
    calibration.save(found)
    assert dataclasses.asdict(calibration.load(found.device)) == dataclasses.asdict(found)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_measured_in_a_minute_at_figures_that_its_maker_allows(tmp_path, monkeypatch):
    monkeypatch.undo()  # real sizes
    device = calibrate.probe().first("cuda")
    start = time.perf_counter()
    found = calibrate.calibrate(tmp_path, say=lambda _: None)
    assert time.perf_counter() - start < 60
    known = catalogue.by_name(device.name, catalogue.shipped())
    if known is None:
        pytest.skip(f"{device.name} is not in the catalogue")
    for dtype in ("bf16" if known.bf16 else "fp16",):
        assert 0.3 * known.rates[dtype] < found.products[dtype] < 1.05 * known.rates[dtype]
    assert 0.5 * known.bandwidth < found.copy < 1.05 * known.bandwidth
    assert 0 < found.attention < found.products[found.attention_dtype]
