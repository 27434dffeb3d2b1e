"""The plan against the clock and the allocator: predicted memory and time beside measured ones, and the frontier.

    PYTHONPATH=src python benchmarks/plan_proof.py OUT.json [--cells grid,frontier] [--seconds 530]
    PYTHONPATH=src python benchmarks/plan_proof.py OUT.json --cells cpu
    PYTHONPATH=src python benchmarks/plan_proof.py OUT.json --report FOLDER

The first needs a CUDA GPU and Triton, no download: weights and tokens are random. Each cell trains a few steps as
`stoker train` would; OUT.json is written after each, and a further call goes on with what is missing in it. The last
needs no GPU: it predicts anew with this version's formulas, and writes a table, a page and the shares that are within
the bounds. A third of the grid takes no part in fitting (`plan_cells.is_held_out`).
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if not __package__:  # run as a file: Python then looks in the file's own folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plan_report
from benchmarks.plan_cells import CPU, DORA, FRONTIERS, GIB, GRID, Cell, Frontier, hardware, most_rows, predict
from stoker.errors import StokerError, TrainingError
from stoker.plan import speed
from stoker.plan.calibration import Calibration
from stoker.plan.choose import choose
from stoker.plan.hardware import Device
from stoker.plan.memory import BASE_BYTES
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stoker.compose.data import Data
    from stoker.compose.trainer import Engine
    from stoker.nn.decoder import Decoder

_WARM_UP, _TIMED, _TIMED_SECONDS = 2, 5, 2.5
# Of a CPU that others use too, more steps.
_TIMED_ON_CPU, _TIMED_SECONDS_ON_CPU = 150, 8.0


def main() -> int:
    """Runs what is asked for; returns 1 if a cell failed or was left out."""
    parser = argparse.ArgumentParser(description="Predicted beside measured.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", default="grid,frontier", help="grid, dora, frontier, cpu, or names, between commas")
    parser.add_argument("--seconds", type=float, default=530.0, help="no cell begins after so many")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--report", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.report is not None:
        return plan_report.write(options.out, options.report)
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Measures the cells that OUT.json lacks."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Asked through NVML, whether there is a GPU does not start CUDA in the parent, which a fork would not survive.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    end = time.monotonic() + options.seconds
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {"cells": {}}
    asked = [one for one in _asked(options.cells) if "error" in found["cells"].get(one.name, {"error": ""})]
    # A process forked for each model, and for each frontier: what ran out of memory there goes with it. The imports
    # are made once, here, before any of them; the GPU is first touched in a child.
    context = multiprocessing.get_context("fork")
    import stoker.compose.bench.rows
    import stoker.compose.trainer
    import stoker.models.native  # noqa: F401

    left_out = 0
    groups = [list(group) for _, group in itertools.groupby(sorted(asked, key=_model_of), key=_model_of)]
    for cells in groups:
        grid = [one for one in cells if isinstance(one, Cell)]
        for together in ([grid] if grid else []) + [[one] for one in cells if isinstance(one, Frontier)]:
            if time.monotonic() < end:
                child = context.Process(target=_group, args=(together, options.out, end, options.commit))
                child.start()
                child.join()
                found = json.loads(options.out.read_text()) if options.out.is_file() else found
            left_out += sum(one.name not in found["cells"] for one in together)
    failed = sum("error" in facts for facts in found["cells"].values())
    print(f"{len(found['cells'])} cells, {failed} failed, {left_out} left out", flush=True)
    return 1 if failed or left_out else 0


def _group(cells: "list[Cell | Frontier]", out: Path, end: float, commit: str | None) -> None:
    """Measures cells that share a model, and adds each to the file. Runs in a process of its own."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"cells": {}}
    found |= _facts(commit)
    first = cells[0].cell if isinstance(cells[0], Frontier) else cells[0]
    started = time.monotonic()
    decoder = build(first)
    print(f"== {first.shape} {first.method}: built in {time.monotonic() - started:.1f} s", flush=True)
    for one in cells:
        if time.monotonic() > end:
            return
        started = time.monotonic()
        facts = _guarded(one, decoder)
        facts |= {"wall_seconds": time.monotonic() - started, "commit": found["commit"]}
        found["cells"][one.name] = facts
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{one.name}: {_line(facts)}", flush=True)


def _asked(names: str) -> list[Cell | Frontier]:
    kinds: dict[str, tuple[Cell | Frontier, ...]] = {"grid": GRID, "dora": DORA, "frontier": FRONTIERS, "cpu": CPU}
    everything = {one.name: one for kind in kinds.values() for one in kind}
    chosen: list[Cell | Frontier] = []
    for name in names.split(","):
        chosen += kinds[name] if name in kinds else (everything[name],)
    return chosen


def _model_of(one: Cell | Frontier) -> tuple[str, ...]:
    cell = one.cell if isinstance(one, Frontier) else one
    return tuple(map(str, cell.model))


def _facts(commit: str | None) -> dict[str, Any]:
    import torch

    from stoker.compose.run_folder import now, versions

    if commit is None:
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = told.stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "commit": commit, "date": now(), "versions": versions()}


def _line(facts: dict[str, Any]) -> str:
    if "error" in facts:
        return f"FAILED {facts['error']}"
    if "rows_that_fit" in facts:
        return (
            f"{facts['rows_that_fit']} rows: trains {facts['trains']} at {facts['peak_reserved_bytes'] / GIB:.2f} GiB; "
            f"one more fails {facts['one_more_fails']} ({facts['wall_seconds']:.0f} s)"
        )
    predicted = facts["predicted"]
    memory = predicted["allocated_bytes"] / facts["peak_bytes"] - 1
    seconds = predicted["seconds"] / facts["step_seconds"] - 1
    return (
        f"{facts['peak_bytes'] / GIB:.2f} GiB (plan {memory:+.1%}), {facts['step_seconds'] * 1e3:.1f} ms (plan "
        f"{seconds:+.1%}); cell took {facts['wall_seconds']:.0f} s"
    )


def _guarded(one: Cell | Frontier, decoder: "Decoder") -> dict[str, Any]:
    """Measures, or says what went wrong, so that one cell cannot end the others."""

    try:
        return frontier(one, decoder) if isinstance(one, Frontier) else measure(one, decoder)
    except (RuntimeError, ValueError, StokerError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        _free()


def build(cell: Cell) -> "Decoder":
    """The cell's model with random weights on the GPU, or the CPU where there is none, its base in its format."""
    import torch

    from stoker.compose.trainer import add_adapter
    from stoker.models import native
    from stoker.models.build import on_meta

    config = cell.config()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = "triton" if device == "cuda" else "reference"
    dtype = torch.float32 if cell.method == "full" or device == "cpu" else torch.bfloat16
    decoder = on_meta(cell.spec(), dtype=dtype, kernels=kernels).to_empty(device=device)
    native.fill(decoder, generator=torch.Generator(device).manual_seed(0), initializer_range=0.02)
    if config.adapter is not None:
        decoder.requires_grad_(False)
        if config.model.quantization != "none":
            _quantize(decoder, config.model.quantization, kernels)
        add_adapter(decoder, config.adapter, seed=0)
    _free()
    return decoder


def _quantize(decoder: "Decoder", kind: str, kernels: str) -> None:
    """Turns the frozen weights into a format, as loading does."""
    from stoker.adapters.fused_block import freeze_into
    from stoker.nn.moe import ExpertLinear, FrozenExpertLinear
    from stoker.quant.experts import NF4Experts
    from stoker.quant.formats import quantize
    from stoker.quant.frozen import Scratch

    scratch = Scratch()
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ExpertLinear) and kind == "nf4":
                parts = 2 if name == "gate_up" else 1
                stored = NF4Experts.quantize(
                    child.weight.detach(), parts=parts, scratch=scratch, implementation=kernels
                )
                parent.register_module(name, FrozenExpertLinear(child, stored))

    def make(weight: "Tensor", part_rows: tuple[int, ...]) -> "nn.Module":
        made = quantize(weight, kind, part_rows=part_rows, scratch=scratch, implementation=kernels)
        return cast("nn.Module", made)

    freeze_into(decoder, make)


def _device(decoder: "Decoder") -> Device:
    from stoker.compose.hardware import probe, with_loaded

    found = with_loaded(probe(), decoder)
    device = found.first("cuda") or found.first("cpu")
    assert device is not None
    return device


def measure(cell: Cell, decoder: "Decoder") -> dict[str, Any]:
    """Trains a few steps and returns the peak, the time of a step, and what the plan said."""
    from stoker.compose.bench.rows import random_data

    device = _device(decoder)
    config = cell.config()
    steps = _TIMED_ON_CPU if device.kind == "cpu" else _TIMED
    data = random_data(config, cell.spec().vocab_size, steps=_WARM_UP + steps)
    rows = _rows(cell, data)
    calibration = _calibrated() if device.kind == "cpu" else None
    predicted = predict(cell, device, rows=rows, measured=calibration)
    plan = predicted.plan
    facts = _train(cell, plan, decoder, data, rows=cell.rows)
    return facts | {
        "cell": asdict(cell),
        "rows": asdict(rows),
        "calibration": None if calibration is None else asdict(calibration),
        "available_bytes": plan.available_bytes,
        "device": asdict(device),
        "plan": plan.to_dict(),
        "predicted": {
            "allocated_bytes": predicted.allocated_bytes,
            "total_bytes": plan.memory.total,
            "seconds": predicted.seconds,
            "parts": dict(predicted.parts),
        },
    }


@cache
def _calibrated() -> Calibration:
    """The CPU's own figures, as `stoker doctor --calibrate` measures them, on one thread."""
    import torch

    from stoker.compose.calibrate import Sizes, calibrate

    torch.set_num_threads(1)
    sizes = replace(Sizes.of("cpu"), disk_mib=16)
    return calibrate(Path(tempfile.gettempdir()), sizes=sizes, say=lambda line: None)


def _rows(cell: Cell, data: "Data") -> speed.Rows:
    """What the rows hold on average, as the plan would count them from prepared data."""
    lengths = data.train.lengths
    if not cell.packed:
        return speed.Rows(cell.length, cell.length, 1.0)
    from stoker.data.pack import pack

    used = len(pack(sorted(lengths, reverse=True), cell.length)) * cell.length
    felt = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    return speed.Rows(cell.length, felt, float(data.train.trained_counts.sum()) / used)


def _train(
    cell: Cell, plan: Plan, decoder: "Decoder", data: "Data", *, rows: int, limit_gib: float | None = None
) -> dict[str, Any]:
    """Takes the steps of `rows` rows under a limit; raises RuntimeError where memory runs out."""
    import torch

    from stoker.compose.trainer import make_engine

    config = cell.config(rows)
    if limit_gib is not None:
        engine_settings = config.engine.model_copy(update={"memory_limit_gib": limit_gib})
        config = config.model_copy(update={"engine": engine_settings})
    torch.set_num_threads(plan.num_threads)
    torch.manual_seed(0)
    before = _allocated()
    engine = make_engine(config, plan, decoder, data, pad_id=0)
    try:
        return _steps(engine, before=before, is_timed=limit_gib is None)
    finally:
        engine.strategy.discard_gradients()
        del engine
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)


def _steps(engine: "Engine", *, before: int, is_timed: bool) -> dict[str, Any]:
    import torch

    from stoker.compose.bench.measure import wait
    from stoker.train.guard import MemoryGuard
    from stoker.train.step import take_step

    device = engine.strategy.device
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    said: list[str] = []
    guard = MemoryGuard(engine.strategy, said.append)
    seconds: list[float] = []
    spent = 0.0
    losses: list[float] = []
    # On a CPU, one thread's own time: what else runs there counts less.
    clock = time.perf_counter if is_gpu else time.process_time
    most, longest = (_TIMED, _TIMED_SECONDS) if is_gpu else (_TIMED_ON_CPU, _TIMED_SECONDS_ON_CPU)
    for number in range(1, _WARM_UP + (most if is_timed else 0) + 1):
        wait(device)
        start = clock()
        outcome = take_step(
            engine.strategy,
            engine.train.step(number - 1),
            number=number,
            learning_rate=1e-5,
            max_gradient_norm=1.0,
            guard=guard,
            notify=said.append,
        )
        wait(device)
        seconds.append(clock() - start)
        losses.append(outcome.loss)
        if said:
            raise RuntimeError(f"out of memory: {said[0]}")
        spent += seconds[-1] if number > _WARM_UP else 0.0
        if spent > longest and number > _WARM_UP + 1:
            break
    timed = seconds[_WARM_UP:] or seconds
    free, total = torch.cuda.mem_get_info() if is_gpu else (0, 0)
    reserved = torch.cuda.memory_reserved() if is_gpu else 0
    return {
        # Of a CPU that others use too, the step that they disturbed least.
        "step_seconds": statistics.median(timed) if is_gpu else min(timed),
        "all_seconds": seconds,
        "losses": losses,
        "weights_bytes": before,
        "held_bytes": _allocated(),
        "peak_bytes": engine.strategy.peak_memory_bytes(),
        "peak_requested_bytes": torch.cuda.memory_stats().get("requested_bytes.all.peak", 0) if is_gpu else 0,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if is_gpu else 0,
        "outside_bytes": total - free - reserved,
    }


def frontier(one: Frontier, decoder: "Decoder") -> dict[str, Any]:
    """Whether the most rows that the plan lets through under the cap train, and one more fails.

    The cap is on the allocator: what the driver holds of the card beside it is taken off first, as on a real one.
    """
    import torch

    from stoker.compose.bench.rows import random_data

    cell = one.cell
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    whole = _device(decoder)
    capped = replace(whole, memory_bytes=int(one.cap_gib * GIB))
    rows = most_rows(cell, capped)
    if not rows:
        return {"error": "the plan lets nothing through"}
    spec = cell.spec()
    plan = choose(cell.config(rows), spec, hardware(capped))
    more = choose(cell.config(rows + 1), spec, hardware(whole), ladder=plan.ladder)
    # The run leaves the context's room by itself (`limit_memory`): the allocator is to get all but what is held here.
    limit = one.cap_gib + (BASE_BYTES["cuda"] - outside) / GIB
    data = random_data(cell.config(rows + 1), spec.vocab_size, steps=_WARM_UP)
    facts: dict[str, Any] = {"rows_that_fit": rows, "cap_gib": one.cap_gib, "outside_bytes": outside}
    facts["predicted_bytes"] = plan.memory.total
    facts["plan"] = plan.to_dict()
    facts["cell"] = asdict(cell)
    try:
        facts |= _train(cell, plan, decoder, data, rows=rows, limit_gib=limit)
        facts["trains"] = True
    except (RuntimeError, TrainingError) as error:
        return facts | {"trains": False, "why": str(error)[:300], "one_more_fails": None, "peak_reserved_bytes": 0}
    _free()
    try:
        beyond = _train(cell, more, decoder, data, rows=rows + 1, limit_gib=limit)
        facts |= {"one_more_fails": False, "one_more_peak_bytes": beyond["peak_bytes"]}
    except (RuntimeError, TrainingError) as error:
        facts |= {"one_more_fails": True, "why": str(error)[:300]}
    return facts


def _allocated() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        # cuBLAS keeps a workspace for each stream, and each cell's graphs have a stream: the next cell would count it.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
