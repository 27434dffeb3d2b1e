"""Small cards and long contexts: what trains under a limit on the GPU's memory, each in a process of its own.

    python -m benchmarks.limits                                # every case
    python -m benchmarks.limits context_24 --sizes 118784 110080 --models /dev/shm/shapes

A case is a run as `stoker train` and `stoker bench` compose it, on random rows, with `engine.memory_limit_gib` as a
card has it: three steps, whose losses must be finite and gradient norms above zero. The limit covers all that the
process takes of the GPU. The allocator is held to the limit less what the plan leaves for the CUDA context, and after
the run what the driver counts beside the allocator is added to the allocator's peak; only a sum within the limit is a
result. A case with several sizes goes through them from the largest to the first that trains.

Cases named "t4" run as on a Turing card: fp16, because it has no bf16, and the attention that is left to it.
Adds to benchmarks/results/limits.{json,csv}. Exit code 1 if a case has no result.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
STEPS = 3
_TURING = (7, 5)


@dataclass(frozen=True)
class Case:
    """Rows of one of `sizes` tokens under `limit_gib`; `settings` are those of a YAML besides."""

    title: str
    limit_gib: float
    sizes: tuple[int, ...]
    settings: dict[str, Any]
    rows: int = 1
    is_turing: bool = False


def _adapted(rank: int) -> dict[str, Any]:
    base = {"base": "shape:llama-3.1-8b", "quantization": "nf4"}
    return {"model": base, "adapter": {"rank": rank, "alpha": rank}}


_ONE_B = {"model": {"base": "shape:llama-3.2-1b"}}
CASES = {
    "t4_8b_2x4096": Case("8B in NF4 and fp16", 15.0, (4096,), _adapted(16), 2, is_turing=True),
    "t4_8b_1x2048": Case("8B in NF4 and fp16", 15.0, (2048,), _adapted(16), is_turing=True),
    "context_16": Case("8B in NF4, rank 32, one row", 15.5, (56064,), _adapted(32)),
    "context_24": Case("8B in NF4, rank 32, one row", 23.5, (118784, 110080), _adapted(32)),
    "full_1b": Case("1B, every weight, all in bf16", 15.0, (2048,), _ONE_B | {"train": {"weight_dtype": "bf16"}}, 4),
    "t4_full_1b": Case(
        "1B, every weight, fp32 weights, products in fp16, Adafactor",
        15.0,
        (2048,),
        _ONE_B | {"train": {"optimizer": {"kind": "adafactor"}}},
        1,
        is_turing=True,
    ),
}


@dataclass
class Result:
    """What became of one size. `outside_bytes`: of the driver beside the allocator.

    `host_bytes`: what waits in pinned host memory by the plan; `resident_bytes`: the process's peak on the host.
    """

    case: str
    title: str
    limit_gib: float
    tokens: int
    rows: int
    device: str = ""
    precision: str = ""
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    outside_bytes: int = 0
    host_bytes: int = 0
    resident_bytes: int = 0
    step_seconds: float = 0.0
    first_step_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    gradient_norm: float = 0.0
    plan: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; without one, all")
    parser.add_argument("--sizes", type=int, nargs="+", help="row lengths to try instead of a case's own")
    parser.add_argument("--base", help="another model, for every case: shape:llama-tiny tries the script out")
    parser.add_argument("--models", type=Path, help="folder for the models that are made")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one size")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--commit", help="commit to note, where there is no git")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "SIZE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, size, out = options.child
        Path(out).write_text(json.dumps(vars(train(name, int(size), options.models, base=options.base))))
        return 0
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    end = time.monotonic() + options.budget
    found: list[Result] = []
    for name in options.cases or CASES:
        found += attempts(name, options, end=end)
        write(found, options)
    reached = {result.case for result in found if not result.error}
    return 0 if reached == set(options.cases or CASES) else 1


def attempts(name: str, options: argparse.Namespace, *, end: float) -> list[Result]:
    """Runs a case at its sizes, the largest first, until one trains."""
    case, results = CASES[name], []
    for size in sorted(options.sizes or case.sizes, reverse=True):
        result = run(name, size, options, seconds=min(options.timeout, end - time.monotonic()))
        results.append(result)
        print(said(result), flush=True)
        if not result.error:
            break
    return results


def run(name: str, size: int, options: argparse.Namespace, *, seconds: float) -> Result:
    """Runs one size in a process of its own."""
    case = CASES[name]
    failed = Result(name, case.title, case.limit_gib, size, case.rows)
    if seconds < 15:
        return replace(failed, error="not started: the time is used up")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.limits", "--child", name, str(size), str(out)]
        command += ["--models", str(options.models)] if options.models else []
        command += ["--base", options.base] if options.base else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return replace(failed, error=f"it did not end within {seconds:.0f} s", seconds=time.monotonic() - start)
        if not out.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return replace(failed, error=last, seconds=time.monotonic() - start)
        result = Result(**json.loads(out.read_text()))
    return replace(result, seconds=time.monotonic() - start)


def train(name: str, size: int, models: Path | None, *, base: str | None = None) -> Result:
    """Takes three steps of a case in this process."""
    import torch

    from stoker.compose.bench import rows
    from stoker.compose.bench.measure import measure
    from stoker.compose.bench.run import open_model
    from stoker.compose.hardware import probe
    from stoker.config.schema import RunConfig
    from stoker.errors import StokerError
    from stoker.plan.choose import Statistics, choose

    case = CASES[name]
    result = Result(name, case.title, case.limit_gib, size, case.rows)
    if case.is_turing:
        _be_turing()
    config = RunConfig.model_validate(settings(case, size, base))
    try:
        opened = open_model(config, models)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        data = rows.random_data(config, opened.spec.vocab_size, steps=STEPS)
        plan = choose(config, opened.spec, probe(), statistics=Statistics(data.longest))
        result = replace(result, device=plan.device_name, precision=plan.precision, plan=plan.to_dict())
        result = replace(result, host_bytes=plan.host_bytes)
        measured, _ = measure(config, plan, opened, data, steps=STEPS - 1, warmup_steps=1)
    except (StokerError, torch.OutOfMemoryError) as error:
        return replace(result, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    result = replace(
        result,
        peak_allocated_bytes=measured.peak_bytes,
        step_seconds=measured.step_seconds,
        first_step_seconds=measured.first_step_seconds,
        losses=list(measured.losses),
        gradient_norm=measured.gradient_norm,
        notices=list(measured.notices),
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return with_device_memory(result, torch.device(plan.device))


def settings(case: Case, size: int, base: str | None = None) -> dict[str, Any]:
    """Returns the configuration of a case, as a YAML would say it."""
    values = {
        **case.settings,
        "data": {"train": [{"path": "builtin:fine-tuning"}], "sequence_length": size, "packing": False},
        "train": {"batch_size": case.rows, "learning_rate": 1e-4, **case.settings.get("train", {})},
        "engine": {"micro_batch_size": case.rows, "memory_limit_gib": case.limit_gib},
        "output": {"folder": "runs/limits"},
    }
    return values if base is None else values | {"model": {**case.settings["model"], "base": base}}


def _be_turing() -> None:
    """Lets this process take its GPU, if there is one, for a T4's kind, so that it runs what such a card would."""
    import torch

    if torch.cuda.is_available():
        from triton.runtime import driver

        # Triton goes on compiling for the GPU that is there: its driver keeps the function that it finds now.
        driver.active.get_current_target()
    torch.cuda.get_device_capability = lambda device=None: _TURING
    torch.cuda.is_bf16_supported = lambda including_emulation=True: False


def with_device_memory(result: Result, device: Any) -> Result:
    """Returns the result with what the GPU gave; an error where that is more than the limit."""
    import torch

    if device.type != "cuda":
        return result
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    reserved = torch.cuda.max_memory_reserved(device)
    error = ""
    if outside + reserved > result.limit_gib * GIB:
        error = f"the GPU gave {(outside + reserved) / GIB:.2f} GiB, more than the limit"
    return replace(result, outside_bytes=outside, peak_reserved_bytes=reserved, error=result.error or error)


def said(result: Result) -> str:
    """Returns a line for people."""
    begin = f"{result.case}: {result.title}, {result.rows} x {result.tokens:,} under {result.limit_gib} GiB: "
    if result.error:
        return f"{begin}{result.error} ({result.seconds:.0f} s)"
    return (
        f"{begin}{STEPS} steps, {result.step_seconds:.1f} s each, in {result.precision}; peak "
        f"{result.peak_allocated_bytes / GIB:.2f} GiB of tensors, {result.peak_reserved_bytes / GIB:.2f} reserved and "
        f"{result.outside_bytes / GIB:.2f} beside; {result.host_bytes / GIB:.1f} GiB wait on the host, whose "
        f"peak is {result.resident_bytes / GIB:.1f}; "
        f"losses {', '.join(f'{loss:.3f}' for loss in result.losses)} ({result.seconds:.0f} s)"
        + "".join(f"\n  {notice}" for notice in result.notices)
    )


def write(found: Sequence[Result], options: argparse.Namespace) -> None:
    """Adds what was found so far to the JSON, in place of that of the same case and size; writes all as CSV."""
    from stoker.compose.bench.report import commit
    from stoker.compose.run_folder import now, versions

    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "limits.json"
    facts = {"commit": options.commit or commit(), "date": now(), "versions": versions()}
    kept = json.loads(path.read_text())["results"] if path.is_file() else []
    made = {(one.case, one.tokens) for one in found}
    kept = [one for one in kept if (one["case"], one["tokens"]) not in made] + [vars(one) | facts for one in found]
    kept.sort(key=lambda one: (list(CASES).index(one["case"]), -one["tokens"]))
    path.write_text(json.dumps({"results": kept}, indent=1) + "\n")
    lines = [{key: value for key, value in one.items() if not isinstance(value, list | dict)} for one in kept]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    sys.exit(main())
