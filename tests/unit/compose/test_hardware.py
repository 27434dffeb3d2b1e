"""What the machine offers, with PyTorch and without, and to a model that is loaded already."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from stoker.compose import hardware, nvml
from stoker.compose.hardware import with_loaded
from stoker.plan.hardware import Device, Hardware

GIB = 2**30
H200 = nvml.Gpu("NVIDIA H200", "GPU-aa11", 140 * GIB, 139 * GIB, (9, 0), is_divided=False)
OWN = H200._replace(name="NVIDIA Own Card")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU alone")
@pytest.mark.parametrize("threads", ["", "1", "64"])
def test_a_cpu_is_told_as_pytorch_sees_it(threads):
    code = (
        "import sys, json; from dataclasses import asdict; from stoker.compose.hardware import look, probe; "
        "told = look(); assert 'torch' not in sys.modules; print(json.dumps([asdict(told), asdict(probe())]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": threads} if threads else {}
    if not threads:
        environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    told, seen = json.loads(done.stdout)
    for one in (told, seen):  # what is free changes meanwhile
        assert one["devices"][-1].pop("memory_bytes") > 0
    assert told == seen


def looked(monkeypatch, *gpus, built=frozenset({"cuda"}), **environment):
    """What is told of such a machine; None where PyTorch is asked."""
    monkeypatch.setattr(nvml, "gpus", lambda: gpus)
    monkeypatch.setattr(hardware, "_built_for", lambda: built)
    monkeypatch.setattr(hardware, "probe", lambda: None)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return hardware.look()


def test_a_gpu_of_the_catalogue_is_told_by_the_driver(monkeypatch):
    found = looked(monkeypatch, H200)
    (gpu, processor) = found.devices
    expected = Device("cuda", "NVIDIA H200", 139 * GIB - GIB // 2, bf16=True, compute_capability=(9, 0))
    assert replace(gpu, triton=False) == expected
    assert processor.kind == "cpu"


def test_pytorch_is_asked_where_the_driver_does_not_tell_all(monkeypatch):
    assert looked(monkeypatch) is None  # no driver
    assert looked(monkeypatch, OWN) is None  # its clocks are wanted
    assert looked(monkeypatch, H200, built={"hip"}) is None
    assert looked(monkeypatch, H200, built=None) is None
    assert looked(monkeypatch, H200._replace(is_divided=True)) is None
    assert looked(monkeypatch, H200, CUDA_VISIBLE_DEVICES="") is None
    assert looked(monkeypatch, H200, TRITON_INTERPRET="1") is None
    t4 = H200._replace(name="Tesla T4", compute_capability=(7, 5))
    assert looked(monkeypatch, t4, H200) is None  # CUDA's order is another
    first = looked(monkeypatch, t4, H200, CUDA_DEVICE_ORDER="PCI_BUS_ID").devices[0]
    assert (first.name, first.bf16) == ("Tesla T4", False)


def test_memory_that_the_model_itself_holds_is_free_for_its_run():
    model = nn.Linear(10, 30, bias=False)
    model.register_buffer("scales", torch.zeros(7, dtype=torch.float16))
    hardware = Hardware((Device("cuda", "a GPU", 5000), Device("cpu", "a CPU", 9000)), num_threads=2)
    seen = with_loaded(hardware, model)
    assert [device.memory_bytes for device in seen.devices] == [5000, 9000 + 10 * 30 * 4 + 7 * 2]
    assert seen.num_threads == 2


def test_the_driver_tells_gpus_without_a_context(monkeypatch):
    told = H200, H200._replace(name="Tesla T4", compute_capability=(7, 5))
    monkeypatch.setattr(nvml, "gpus", lambda: told)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = hardware.gpus_here()
    assert (first.name, first.compute_capability, first.bf16) == ("NVIDIA H200", (9, 0), True)
    assert first.memory_bytes == 139 * GIB - GIB // 2  # a run's own context comes first
    assert not second.bf16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [one.name for one in hardware.gpus_here()] == ["Tesla T4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.gpus_here() == ()
