"""How many GPUs of a machine a run takes: what the driver tells, and what the plan makes of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from stoker.compose import devices
from stoker.config.load import parse
from stoker.plan.hardware import Device

GIB = 2**30
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 79 * GIB, bf16=True, compute_capability=(9, 0), triton=True)


def run(*overrides):
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 64},
        "train": {"learning_rate": 2e-4, "batch_size": 8},
        "output": {"folder": "runs/x"},
    }
    return parse(values, overrides)


def test_a_model_so_small_that_more_gpus_only_wait_takes_one():
    count, why = devices.planned_processes(run("engine.kernels=reference"), [H100] * 8)
    assert count == 1
    assert "1 of 8 GPUs: more would not make a step faster" in why


def test_a_model_that_fills_a_gpu_takes_those_that_make_it_faster(monkeypatch):
    from stoker.arch import shapes
    from stoker.compose import model

    spec = shapes.spec("llama-3.1-8b")
    base = model.Base("x", None, Path("x"), {}, spec)
    monkeypatch.setattr(model, "open_base", lambda *_, **__: base)
    lora = ("adapter={}", "data.sequence_length=4096", "train.batch_size=32")
    count, why = devices.planned_processes(run(*lora), [H100] * 8)
    assert count == 8
    assert "s on one" in why
    # Twelve rows can be dealt out to 6 at most of 8.
    assert devices.planned_processes(run(*lora, "train.batch_size=12"), [H100] * 8)[0] == 6
    full, why = devices.planned_processes(run("data.sequence_length=2048"), [H100] * 8)
    assert full == 8
    assert "fit" in why or "fewer" in why
    slow = [replace(H100, name="GeForce RTX 4090", memory_bytes=23 * GIB)] * 2
    assert devices.planned_processes(run(*lora), slow)[0] == 2


@pytest.mark.parametrize("told", ["engine.num_processes=2", "engine.strategy=single", "engine.device=cpu"])
def test_what_the_user_says_is_not_planned(told):
    count, why = devices.planned_processes(run(told), [H100] * 8)
    assert (count, why) == (2 if "num" in told else 1, "")
