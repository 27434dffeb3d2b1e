"""Seconds of a step against those measured on one H200 (benchmarks/results/single_gpu.json, docs/engine_log.md)."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.arch import families, shapes
from stoker.compose.bench.shapes import SHAPES
from stoker.config.load import load
from stoker.plan import speed
from stoker.plan.amounts import Way, amounts
from stoker.plan.catalogue import shipped
from stoker.plan.choose import choose
from stoker.plan.efficiencies import MEASURED
from stoker.plan.hardware import Device, Hardware
from stoker.plan.memory import workspace_bytes

ROOT = Path(__file__).parents[3]
H200 = shipped()["h200"]
FITTED, HELD_OUT = ("A", "E"), ("B", "C")


def measured(cell):
    runs = json.loads((ROOT / "benchmarks" / "results" / "single_gpu.json").read_text())["runs"]
    run = next(run for run in runs if run["cell"] == cell and run["commit"] == "1eafc66")
    return next(one["step_seconds"] for one in run["results"] if one["name"] == "stoker")


def planned(cell, *overrides, device=H200):
    config = load(ROOT / "benchmarks" / "single_gpu" / f"{cell}.yaml", overrides)
    spec = families.read(SHAPES[config.model.base.removeprefix("shape:")], "shape")
    plan = choose(config, spec, Hardware((device.device(), Device("cpu", "CPU", 120 * 2**30))))
    return config, spec, plan


def predicted(cell, *overrides, device=H200, rows=None):
    config, spec, plan = planned(cell, *overrides, device=device)
    return speed.step(config, spec, plan, device, rows=rows or speed.Rows(plan.row_tokens, plan.row_tokens))


@pytest.mark.parametrize("cell", FITTED)
def test_the_cells_that_the_constants_come_from_are_met(cell):
    assert predicted(cell).seconds == pytest.approx(measured(cell), rel=0.03)


@pytest.mark.parametrize("cell", HELD_OUT)
def test_cells_held_out_of_the_fit_are_predicted(cell):
    # B recomputes and offloads, C does so over NF4; nothing of either went into a constant.
    assert predicted(cell).seconds == pytest.approx(measured(cell), rel=0.03)


def test_a_small_batch_waits_for_its_launches_and_a_graph_has_none():
    # docs/engine_log.md: 1B at 1 x 512 takes 9.5 ms eager, of which kernels take 4.5.
    eager = predicted("G", "engine.cuda_graphs=false")
    assert eager.seconds == pytest.approx(9.5e-3, rel=0.05)
    graph = predicted("G")
    assert graph.waiting == 0.0
    assert graph.seconds == pytest.approx(4.5e-3, rel=0.25)


def test_a_mixtures_first_product_is_made_again_on_every_rung():
    spec = shapes.spec("mixtral-8x7b")
    one = families.read(SHAPES["mixtral-8x7b-4-layers"], "shape")
    assert one.layers[0] == spec.layers[0]
    way = Way("op by op", ("all",) * 4, "nf4", None, True, uses_triton=True)
    work = amounts(one, way, 1024, 1024, 1.0)
    again = {(each.into, each.out): each.again / 4 for each in work.products if each.is_grouped}
    assert again == {(4096, 2 * 14336): 1, (14336, 4096): 0}
    experts = 8 * 4096 * 14336
    attention = 4096 * (4096 + 2 * 1024 + 4096)
    # Each weight is made dense forward and backward, gate and up a third time.
    assert work.dequantised_bytes == pytest.approx(4 * 2.52 * (2 * attention + (3 * 2 + 2) * experts))


@pytest.mark.parametrize("cell", ["qwen3_moe", "mixtral", "mixtral_nf4"])
def test_mixtures_that_no_constant_comes_from_are_predicted(cell):
    folder = ROOT / "benchmarks"
    with (folder / "results" / "architectures.csv").open(newline="") as file:
        run = [one for one in csv.DictReader(file) if one["cell"] == cell and one["name"] == "stoker"][-1]
    config = load(folder / "architectures" / f"{cell}.yaml", ())
    spec = families.read(SHAPES[config.model.base.removeprefix("shape:")], "shape")
    plan = choose(config, spec, Hardware((H200.device(), Device("cpu", "CPU", 120 * 2**30))))
    step = speed.step(config, spec, plan, H200, rows=speed.Rows(4096, 4096))
    allocated = plan.memory.total - plan.memory.reserve + workspace_bytes((9, 0))
    assert allocated == pytest.approx(float(run["peak_bytes"]), rel=0.02)
    assert step.seconds == pytest.approx(float(run["step_seconds"]), rel=0.07)


def test_parts_add_up_and_what_is_hidden_is_not_among_them():
    step = predicted("B")
    assert step.seconds == pytest.approx(sum(step.parts().values()))
    assert step.hidden["copies to the host"] > 0.0
    assert step.waiting == 0.0


def test_a_step_waits_for_copies_over_a_link_that_is_too_slow():
    slow = replace(H200, host_link=4e9)
    assert predicted("B", device=slow).waiting > 0.5


def test_only_trained_tokens_go_through_the_head():
    half = predicted("A", rows=speed.Rows(4096, 4096, trained_share=0.5))
    whole = predicted("A")
    assert half.head == pytest.approx(whole.head / 2, rel=0.01)
    assert half.matmul == whole.matmul


def test_short_documents_spare_attention():
    packed = predicted("A", rows=speed.Rows(4096, 512))
    # An eighth of the scores, in tiles of which more are half empty.
    emptier = (1 + MEASURED.attention_half / 512) / (1 + MEASURED.attention_half / 4096)
    assert packed.attention == pytest.approx(emptier * predicted("A").attention / 8, rel=0.02)


def test_weights_that_are_trained_cost_their_gradient_and_their_update():
    full, adapter = predicted("I"), predicted("E")
    assert full.matmul == pytest.approx(1.5 * adapter.matmul)
    assert full.adapters == 0.0
    assert full.optimizer > 20 * adapter.optimizer


def test_fp8_products_are_faster_the_heads_among_them():
    fp8, bf16 = predicted("F"), predicted("A")
    assert 0.5 < fp8.matmul / bf16.matmul < 0.7
    assert 0.5 < fp8.head / bf16.head < 0.7
    assert fp8.dequantise > 0.0


def test_a_device_without_bf16_computes_in_fp16_at_its_own_rate():
    t4 = shipped()["t4"]
    step = predicted("E", "engine.precision=auto", "engine.micro_batch_size=1", "engine.recompute=auto", device=t4)
    assert step.matmul == pytest.approx(predicted("E").matmul * 989.5 / 65, rel=0.02)


def test_micro_batches_of_a_step_add_up():
    one, four = predicted("A"), predicted("A", "train.batch_size=8", "engine.micro_batch_size=2")
    assert four.matmul == pytest.approx(4 * one.matmul)
    assert four.optimizer == pytest.approx(one.optimizer)
