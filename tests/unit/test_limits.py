"""The benchmark of small cards: its cases are configurations that fit, and its script measures what it says."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks import limits

from stoker.arch import families
from stoker.compose.bench import shapes
from stoker.config.schema import RunConfig
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware

GIB = 2**30


def plan(name, size):
    case = limits.CASES[name]
    capability = (7, 5) if case.is_turing else (9, 0)
    card = Device("cuda", "a card", 139 * GIB, not case.is_turing, capability, triton=True)
    hardware = Hardware((card, Device("cpu", "CPU", 120 * GIB, bf16=True)))
    config = RunConfig.model_validate(limits.settings(case, size))
    spec = families.read(shapes.SHAPES[config.model.base.removeprefix(shapes.PREFIX)], "config.json")
    return choose(config, spec, hardware)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in limits.CASES.items() for size in case.sizes])
def test_the_plan_accepts_every_case(name, size):
    made = plan(name, size)
    assert made.memory.total <= limits.CASES[name].limit_gib * GIB
    assert made.precision == ("fp16" if limits.CASES[name].is_turing else "bf16")


def test_the_cases_reach_the_contexts_that_they_are_for():
    assert min(limits.CASES["context_24"].sizes) >= 110_000
    assert min(limits.CASES["context_16"].sizes) >= 56_000
    assert (limits.CASES["context_24"].limit_gib, limits.CASES["context_16"].limit_gib) == (23.5, 15.5)


@pytest.mark.slow
def test_a_case_takes_three_steps_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    models = ["--base", "shape:llama-tiny", "--models", str(tmp_path / "models")]
    arguments = ["context_16", "--sizes", "32", "64", "--results", str(tmp_path), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["limits", *arguments, *models])
    assert limits.main() == 0
    (result,) = json.loads((tmp_path / "limits.json").read_text())["results"]  # 64 trains, and 32 is not tried
    assert (result["tokens"], len(result["losses"]), result["error"]) == (64, 3, "")
    assert "1 x 64 under 15.5 GiB: 3 steps" in capsys.readouterr().out
    assert (tmp_path / "limits.csv").read_text().count("\n") == 2


def test_more_than_the_limit_on_the_gpu_is_no_result(monkeypatch):
    result = limits.Result("context_16", "a case", 15.5, 64, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123 * GIB, 139 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 14 * GIB)
    device = torch.device("cuda")
    assert limits.with_device_memory(result, device) == replace(result, outside_bytes=GIB, peak_reserved_bytes=14 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 15 * GIB)
    assert "16.00 GiB, more than the limit" in limits.with_device_memory(result, device).error
