"""The benchmark of scaling: what it asks of each count of GPUs, how it compares, and that it runs on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.scaling import launch, results
from benchmarks.scaling.cells import ALONE, CELLS
from benchmarks.scaling.collectives import moved
from benchmarks.scaling.communication import times

from stoker.compose.bench import shapes
from stoker.config.load import parse
from stoker.plan import many

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CELLS)
def test_every_count_takes_the_same_steps(name):
    cell = CELLS[name]
    configs = {count: parse(cell.config(count, (1, 2, 4), folder=f"shape:{cell.model}")) for count in (1, 2, 4)}
    assert len({config.train.batch_size for config in configs.values()}) == 1
    assert [configs[count].engine.context_parallel for count in (1, 2, 4)] == ([1, 2, 4] if cell.context else [1] * 3)
    assert configs[1].engine.strategy == "single"
    assert configs[4].engine.strategy in ("ddp", "fsdp2")
    shapes.config_of(cell.model.removesuffix("-nf4"))


@pytest.mark.parametrize("which", ALONE)
def test_alone_a_strategy_runs_as_single_and_its_engine_as_itself(which):
    strategy, changes = ALONE[which]
    cell = CELLS["tiny"]
    config = parse(cell.config(1, [1], folder="shape:llama-tiny", strategy=strategy, engine_changes=changes))
    assert many.does_more(config.engine) == which.endswith("_engine")
    assert which.removesuffix("_engine") == config.engine.strategy == strategy


def test_time_in_collectives_is_counted_once_and_what_hides_behind_work_is_not_exposed():
    kernels = [("gemm", 0, 4000), ("ncclDevKernel_AllGather", 3000, 6000), ("ncclDevKernel_AllGather", 5000, 7000)]
    assert times([*kernels, ("gemm", 9000, 10000)]) == {"collectives": 4.0, "exposed": 3.0, "busy": 8.0}


def facts(gpus, speed, losses=(2.0, 1.0)):
    common = {"communication": {"collectives": 10.0, "exposed": 5.0}, "peak_bytes": 30, "predicted_bytes": 40}
    return common | {"num_gpus": gpus, "tokens_per_second": speed, "step_seconds": 0.1, "losses": list(losses)}


def test_efficiency_is_that_of_speed_per_gpu():
    found = results.compared(facts(4, 360.0, (2.0, 1.25)), facts(1, 100.0))
    assert found["efficiency"] == pytest.approx(0.9)
    assert found["loss_difference"] == 0.25
    assert (found["collectives_share"], found["exposed_share"]) == pytest.approx((0.1, 0.05))
    assert found["memory_of_plan"] == 0.75


def test_what_a_strategy_costs_alone_is_held_against_single():
    single = facts(1, 100.0) | {"strategy": "single"}
    slower = facts(1, 80.0) | {"strategy": "fsdp2", "step_seconds": 0.125, "peak_bytes": 30 + 2**21}
    found = results.beside_single(slower, single)
    assert (found["cost_of_strategy"], found["bytes_of_strategy"]) == (pytest.approx(0.25), 2**21)
    shown = {"cell": "alone_fsdp2_engine", "kind": "training", "tokens_per_second_per_gpu": 80.0}
    assert "+25.0% of single's time, +2 MiB" in results.line(found | shown)
    assert "cost_of_strategy" not in results.beside_single(slower, slower)


def test_a_peer_with_another_first_loss_did_another_job():
    ours = facts(2, 300.0)
    assert results.beside(facts(2, 200.0), ours)["speed_of_peer"] == pytest.approx(1.5)
    other = results.beside(facts(2, 200.0, (2.1, 1.0)), ours)
    assert "not the same job" in other["error"]
    assert "speed_of_peer" not in other


def test_an_all_reduce_moves_twice_what_the_others_do():
    assert moved("all_reduce", 400, 4) == 600
    assert moved("all_gather", 400, 4) == 300


def test_the_cause_is_the_process_own_and_not_its_launchers():
    lines = ["Loading", "ValueError: no such thing", "E1 torch/distributed/elastic/api.py] x", "ChildFailedError: "]
    assert launch.cause(lines) == "ValueError: no such thing"
    assert launch.cause([]) == "no message"


def test_a_run_that_takes_too_long_is_ended_with_all_that_it_started():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert "did not end" in launch.finish(command, timeout=1.0, environment=dict(os.environ))


@pytest.mark.skipif(os.environ.get("STOKER_TEST_ALL") != "1", reason="make test-distributed runs it")
def test_it_measures_two_processes_on_a_cpu(tmp_path):
    cells = ["tiny", "tiny_full", "tiny_nf4", "tiny_context", "collectives", "resume", "kill"]
    options = ["--gpus", "1,2", "--steps", "1", "--results", str(tmp_path), "--models", str(tmp_path / "models")]
    command = [sys.executable, "-m", "benchmarks.scaling", *cells, *options, "--timeout", "400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "scaling.json").read_text())["runs"]
    trained = [run for run in runs if run["kind"] == "training"]
    assert [run["num_gpus"] for run in trained] == [1, 2] * 4
    assert all(run["loss_difference"] < 1e-5 for run in trained)
    assert [run["cell"] for run in runs if run["kind"] == "peer"] == ["tiny", "tiny_full"]
    assert all("error" not in run for run in runs if run["kind"] == "peer")
    assert [run["error"] for run in runs if run["kind"] == "recovery"] == ["", ""]
    (links,) = [run for run in runs if run["kind"] == "collectives"]
    assert set(links["summary"]) == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
