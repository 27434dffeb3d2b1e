"""The cells of the single-GPU benchmark, its runner, and the table made from its results."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from docs.generate import single_gpu_table

from stoker.arch import families
from stoker.compose.bench import shapes
from stoker.config.load import load
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware

ROOT = Path(__file__).parents[2]
CELLS = sorted((ROOT / "benchmarks" / "single_gpu").glob("*.yaml"))
ARCHITECTURES = sorted((ROOT / "benchmarks" / "architectures").glob("*.yaml"))
H200 = Hardware(
    (
        Device("cuda", "NVIDIA H200", 139 * 2**30, bf16=True, compute_capability=(9, 0), triton=True),
        Device("cpu", "CPU", 120 * 2**30, bf16=True),
    )
)


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("single_gpu_run", ROOT / "benchmarks" / "single_gpu" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def facts(cell, speed, peers=()):
    def row(name, tokens, error=""):
        return {
            "name": name,
            "tokens_per_second": tokens,
            "peak_bytes": 2**30,
            "share_of_floor": 0.8,
            "share_of_recomputed_floor": 0.9,
            "stoker_speed_ratio": speed / tokens if tokens else None,
            "stoker_memory_ratio": 1.0,
            "error": error,
        }

    rows = [row("stoker", speed), *(row(name, tokens, "" if tokens else "no memory") for name, tokens in peers)]
    shared = {"title": f"LoRA on shape:{cell}", "rows": "2 x 8", "device": "H200", "commit": "abc", "date": "now"}
    return shared | {
        "cell": cell,
        "versions": {"torch": "2.11"},
        "floor": {"tokens_per_second": 1000.0},
        "results": rows,
        "notices": [],
    }


def test_there_is_a_cell_for_each_kind_of_work():
    assert [path.stem for path in CELLS] == [*"ABCDEFGHI", "I_tight"]


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_a_cell_fits_an_h200_and_runs_as_it_says(path):
    config = load(path)
    spec = families.read(shapes.SHAPES[config.model.base.removeprefix("shape:")], "shape")
    plan = choose(config, spec, H200)
    assert plan.kernels == "triton"
    assert plan.micro_batch_size == config.train.batch_size
    is_tight = path.stem in ("B", "C", "D", "I_tight")
    assert plan.offload_activations == is_tight
    assert set(plan.keep) == {"mixer" if path.stem == "I_tight" else "attention" if is_tight else "all"}
    assert plan.cuda_graphs == (path.stem in ("E", "F", "G"))
    assert plan.quantization == {"C": "nf4", "D": "nf4", "F": "fp8"}.get(path.stem, "none")
    assert f"single_gpu/{path.name}" in path.read_text()


def test_there_is_a_cell_for_each_architecture_that_differs(runner):
    assert [path.stem for path in ARCHITECTURES] == ["mamba", "mamba2", "mixtral", "mixtral_nf4", "qwen3_moe"]
    assert runner.PEERS.keys() == {path.stem for path in ARCHITECTURES}


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_an_architecture_fits_an_h200_and_is_captured(path, runner):
    config = load(path)
    spec = families.read(shapes.SHAPES[config.model.base.removeprefix("shape:")], "shape")
    plan = choose(config, spec, H200)
    assert (plan.kernels, plan.layers, plan.cuda_graphs) == ("triton", "op by op", True)
    assert plan.micro_batch_size == config.train.batch_size
    kept = {"qwen3_moe": "attention", "mixtral": "input", "mixtral_nf4": "input"}
    assert set(plan.keep) == {kept.get(path.stem, "all")}
    assert plan.quantization == ("nf4" if path.stem == "mixtral_nf4" else "none")
    assert f"architectures/{path.name} --peers {runner.PEERS[path.stem]}" in path.read_text()


def test_a_cell_that_is_not_of_the_suite_is_refused(runner, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "mamba"])
    with pytest.raises(SystemExit):
        runner.main()
    assert "no cell mamba of single_gpu" in capsys.readouterr().err


def test_each_cell_runs_beside_its_own_peer_and_shares_it(runner, monkeypatch, tmp_path):
    commands = []

    def run(command, **_):
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        cell = Path(command[4]).stem
        peers = [(command[command.index("--peers") + 1], 50.0)] if command[command.index("--peers") + 1] else []
        out.write_text(json.dumps(facts(cell, 100.0, peers)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", run)
    arguments = ["mamba", "mixtral", "mixtral_nf4", "--suite", "architectures", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    assert runner.main() == 0
    assert [command[command.index("--peers") + 1] for command in commands] == ["hf", "hf", ""]
    assert [command[command.index("--peer-timeout") + 1] for command in commands] == ["40.0", "180.0", "180.0"]
    *_, last = json.loads((tmp_path / "architectures.json").read_text())["runs"]
    assert [row["name"] for row in last["results"]] == ["stoker", "hf"]
    assert "--suite architectures" in single_gpu_table(tmp_path / "architectures.json", suite="architectures")


def test_peers_of_the_same_job_are_shared_between_cells(runner):
    shared = runner.with_peers(facts("F", 300.0), facts("A", 200.0, [("unsloth", 150.0), ("hf", None)]))
    ours, unsloth, failed = shared["results"]
    assert unsloth["stoker_speed_ratio"] == 2.0
    assert failed["error"] == "no memory"
    assert ours["tokens_per_second"] == 300.0
    assert "those of cell A" in shared["notices"][0]


def test_results_are_appended_and_the_last_of_a_cell_is_shown(runner, tmp_path):
    for speed in (100.0, 300.0):
        runner.append(facts("A", speed, [("unsloth", 150.0)]), tmp_path)
    runner.append(facts("B", 50.0, [("hf", None)]), tmp_path)
    assert len(json.loads((tmp_path / "single_gpu.json").read_text())["runs"]) == 3
    assert (tmp_path / "single_gpu.csv").read_text().count("\n") == 7
    table = single_gpu_table(tmp_path / "single_gpu.json")
    assert "300 tokens/s, 1.0 GiB | 80% (90%)" in table
    assert "**2.00 x** its speed" in table
    assert "Transformers + PEFT: no result" in table
    assert "100 tokens/s" not in table


def test_without_results_there_is_no_table(tmp_path):
    assert single_gpu_table(tmp_path / "none.json") == ""


def test_attention_of_packed_rows_is_measured_with_each_room(tmp_path):
    from benchmarks import packed_attention

    packed_attention.main([str(tmp_path / "packed.json"), "--tiny"])
    found = json.loads((tmp_path / "packed.json").read_text())["results"][0]
    assert set(found["milliseconds"]) == {"exact", "rounded", "roomy"}
    assert found["blocks"]["exact"] <= found["blocks"]["rounded"] <= found["blocks"]["roomy"]


@pytest.mark.slow
def test_every_script_finds_what_it_imports_as_a_file_and_as_a_module(tmp_path):
    """One interpreter for all of them, in which the repository's folder is on the path only where Python puts it."""
    pytest.importorskip("triton")
    scripts = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if "__name__ ==" in path.read_text())
    assert len(scripts) > 15
    code = """
import importlib, runpy, sys
root, *scripts = sys.argv[1:]
clean = [place for place in sys.path if place not in ("", root)]
def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
for script in scripts:
    forget()
    sys.path[:] = [f"{root}/{script}".rpartition("/")[0], *clean]
    runpy.run_path(f"{root}/{script}", run_name="not_main")
    if "single_gpu" not in script:  # a folder that is no package
        forget()
        sys.path[:] = [root, *clean]
        importlib.import_module(script.removesuffix(".py").replace("/", "."))
"""
    names = [str(path.relative_to(ROOT)) for path in scripts]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, str(ROOT), *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
