"""A CPU's step: against those measured on one core (benchmarks/results/plan_proof_cpu.json), and its calls counted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import plan_proof, plan_report
from benchmarks.plan_cells import CPU, Cell, predict

from stoker.plan.cpu import CpuRates

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
MIB = 2**20


def measured():
    found = json.loads((RESULTS / "plan_proof_cpu.json").read_text())
    return plan_report.lines(found, CPU)


def test_steps_of_tiny_models_are_within_a_quarter_of_measured_ones():
    made = measured()
    assert len(made) >= 12
    assert sum(one.held_out for one in made) >= 4
    for one in made:
        assert abs(one.time_error) < 0.25, one.name


def test_a_cpu_that_was_not_measured_is_planned_within_a_half():
    """The defaults are another day's figures of the same core, less what a plainer one would lack."""
    from stoker.plan.hardware import Device

    device = Device("cpu", "a CPU", 16 * 2**30, bf16=True)
    seconds = {one.name: one.measured_seconds for one in measured()}
    for cell in CPU:
        assert predict(cell, device).seconds == pytest.approx(seconds[cell.name], rel=0.5), cell.name


def dispatched(method, rung, layers):
    """Operations that a step of a tiny model dispatches, by counting them, and the plan's count of its layers'."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from stoker.compose.bench.rows import random_data
    from stoker.compose.trainer import make_engine
    from stoker.plan.hardware import Device
    from stoker.train.guard import MemoryGuard
    from stoker.train.step import take_step

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += 1
            return func(*args, **(kwargs or {}))

    cell = Cell("tiny", "llama-tiny", method, 1, 16, rung, layers=layers, precision="fp32")
    config, decoder = cell.config(), plan_proof.build(cell)
    data = random_data(config, cell.spec().vocab_size, steps=3)
    plan = predict(cell, Device("cpu", "a CPU", 2**33, bf16=True)).plan
    engine = make_engine(config, plan, decoder, data, pad_id=0)
    torch.manual_seed(0)

    def step(number):
        guard = MemoryGuard(engine.strategy, lambda said: None)
        rows = engine.train.step(number - 1)
        take_step(
            engine.strategy,
            rows,
            number=number,
            learning_rate=1e-5,
            max_gradient_norm=1.0,
            guard=guard,
            notify=lambda said: None,
        )

    step(1)
    with Count() as counted:
        step(2)
    return counted.number


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rung"),
    [
        *[("full", "none"), ("lora", "none"), ("full", "input"), ("lora", "mixer")],
        *[("dora", "none"), ("dora", "mixer"), ("dora", "input")],
    ],
)
def test_the_calls_of_a_layer_are_those_that_pytorch_dispatches(method, rung):
    from stoker.config.schema import Adapter
    from stoker.plan.adapter import adapted
    from stoker.plan.amounts import Way, amounts

    a_layer = dispatched(method, rung, 2) - dispatched(method, rung, 1)
    spec = Cell("tiny", "llama-tiny", method, 1, 16, rung, layers=1).spec()
    is_frozen = method != "full"
    layers, keep = ("op by op", "all") if rung == "none" else ("fused", rung)
    kept = adapted(spec, Adapter(kind="dora", rank=16), "none") if method == "dora" else None
    way = Way(layers, (keep,), "none", None, is_frozen, uses_triton=False, adapter=kept)
    counted = amounts(spec, way, 16, 16, 1.0)
    calls = counted.calls + counted.dora_calls + is_frozen * counted.adapter_calls
    assert calls == pytest.approx(a_layer, rel=0.1)


def test_results_that_leave_the_caches_are_slower_and_longer_documents_are_faster():
    found = CpuRates()
    assert found.bandwidth(MIB) == found.in_caches
    assert found.bandwidth(64 * MIB) == pytest.approx(found.in_memory)
    assert found.in_memory < found.bandwidth(16 * MIB) < found.in_caches
    assert found.attention(1e9, 0.4, 1024, 64) == pytest.approx(1e9)
    assert found.attention(1e9, 0.4, 128, 64) < 0.5e9
    assert found.attention(1e9, 0.4, 1024, 16) == pytest.approx(1e9 * 0.25**0.4)
    assert replace(found, attention_half=0.0).attention(1e9, 0.4, 1, 64) == pytest.approx(1e9)
