"""`stoker bench`, whole: from a configuration to measured speed and memory, beside the floor and other trainers."""

import gc
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from stoker.compose.bench import floor, peers, profile, report, rows, shapes
from stoker.compose.bench.measure import WARMUP_STEPS, Steps, documents_of, measure
from stoker.compose.bench.result import Measured
from stoker.compose.hardware import probe
from stoker.compose.model import Base, fitted, open_base
from stoker.compose.run_folder import now, versions
from stoker.compose.trainer import compute_dtype, describe
from stoker.config.schema import RunConfig
from stoker.plan.choose import Statistics, choose
from stoker.plan.plan import Plan


@dataclass(frozen=True)
class Options:
    """How to measure. `cell`: the name under which results are kept; `models`: where `shape:` models are kept.

    `profile`: a CSV for where the time of one more step goes, by kernel. `peer_timeout_seconds`: what each peer may
    take; all of them end within `budget_seconds` from the start.
    """

    cell: str = "run"
    steps: int = 8
    peers: tuple[str, ...] = ()
    output: Path | None = None
    models: Path | None = None
    peer_timeout_seconds: float = 600.0
    budget_seconds: float = math.inf
    commit: str | None = None
    profile: Path | None = None


def bench(config: RunConfig, options: Options, *, console: Console) -> report.Facts:
    """Measures the run on random rows and returns everything that was found; a table is shown on `console`.

    Raises:
        UserError: something the user can mend. TrainingError: loss or gradient make no sense, or memory ran out.
    """
    end = time.monotonic() + options.budget_seconds
    base = open_model(config, options.models)
    config = fitted(config, base)
    data = rows.random_data(config, base.spec.vocab_size, steps=WARMUP_STEPS + options.steps)
    plan = choose(config, base.spec, probe(), statistics=Statistics(data.longest))
    _say(console, f"[bold]{describe(config)}[/] on random rows ({_rows_in_words(config)}); data.train is not read")
    if plan.device == "cpu":
        _say(console, "[yellow]There is no GPU here: this measures the CPU.[/]")
    _say(console, plan.table(), markup=False)
    ours, steps = measure(config, plan, base, data, steps=options.steps, profile=options.profile is not None)
    _free(plan)
    bound = _floor(config, plan, base, steps)
    _free(plan)
    left_out = peers.names_without(options.peers, device=plan.device)
    measured = [ours]
    facts = _facts(config, options, plan, bound, steps, base=base, measured=measured, left_out=left_out)
    _write(facts, options)  # so that a peer that takes the machine down does not take our numbers with it
    with tempfile.TemporaryDirectory() as folder:
        job = peers.write_job(config, plan, base, steps, Path(folder))
        for name in options.peers:
            if name in left_out:
                continue
            seconds = min(options.peer_timeout_seconds, end - time.monotonic())
            measured.append(peers.checked(peers.run(name, job, timeout_seconds=max(0.0, seconds)), ours))
            facts = _facts(config, options, plan, bound, steps, base=base, measured=measured, left_out=left_out)
            _write(facts, options)
    _show(facts, console)
    if options.profile is not None:
        console.print(profile.table(ours.kernels, ours.step_seconds))
        profile.write(ours.kernels, options.profile)
        _say(console, f"written: {options.profile}")
    if options.output is not None:
        _say(console, f"written: {options.output}, {options.output.with_suffix('.csv')}")
    return facts


def _write(facts: report.Facts, options: Options) -> None:
    if options.output is not None:
        report.write(facts, options.output)


def _facts(
    config: RunConfig,
    options: Options,
    plan: Plan,
    bound: floor.Floor,
    steps: Steps,
    *,
    base: Base,
    measured: Sequence[Measured],
    left_out: Mapping[str, str],
) -> report.Facts:
    """Returns everything that was found so far, as JSON values."""
    import torch

    return {
        "cell": options.cell,
        "title": describe(config),
        "rows": _rows_in_words(config),
        "tokens_counted": "trained" if steps.is_packed else "all",
        "device": plan.device_name,
        "commit": options.commit or report.commit(),
        "date": now(),
        "versions": versions() | {"cuda": torch.version.cuda or "none"},
        "steps": options.steps,
        "plan": plan.to_dict(),
        "floor": report.floor_values(bound, sum(steps.tokens) / len(steps.tokens)),
        "results": report.rows(measured, bound, computes_again=any(rung != "all" for rung in plan.keep)),
        "losses": {one.name: list(one.losses) for one in measured},
        "notices": report.notices(measured, left_out, about_floor=floor.simplified(base.spec)),
    }


def open_model(config: RunConfig, models: Path | None) -> Base:
    """Returns the base, a model of a well-known shape made on the device and kept in `models` if need be."""
    import torch

    name = config.model.base
    if not shapes.is_shape(name):
        chosen = config.model
        return open_base(name, revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    asked = config.engine.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    opened = open_base(str(shapes.resolve(name, device=device, folder=models)))
    return Base(name, None, opened.folder, opened.config, opened.spec)


def _floor(config: RunConfig, plan: Plan, base: Base, steps: Steps) -> floor.Floor:
    import torch

    first, count = steps.batches[0][0], len(steps.batches) * len(steps.batches[0])
    trained = sum(one.num_trained_tokens for step in steps.batches for one in step)
    return floor.measure(
        base.spec,
        rows=first.num_rows,
        length=first.input_ids.shape[1],
        documents=documents_of(first),
        trained_tokens=round(trained / count),
        micro_batches=len(steps.batches[0]),
        frozen=config.adapter is not None,
        device=torch.device(plan.device),
        dtype=compute_dtype(plan),
        fp8=plan.quantization == "fp8" and plan.device == "cuda",
    )


def _free(plan: Plan) -> None:
    """Gives the device's memory back, and lifts the run's limit on it."""
    import torch

    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def _rows_in_words(config: RunConfig) -> str:
    size, length = config.train.batch_size, config.data.sequence_length
    if not config.data.packing:
        return f"{size} x {length}"
    return f"{size} x {length}, packed, log-normal lengths of median {rows.MEDIAN_TOKENS}"


def _show(facts: report.Facts, console: Console) -> None:
    console.print(report.table(facts))
    rates = facts["floor"]
    _say(
        console,
        f"floor: {rates['tokens_per_second']:,.0f} tokens/s ({rates['recomputed_tokens_per_second']:,.0f} with every "
        f"layer computed twice); the largest product reaches {rates['peak_flops'] / 1e12:,.1f} TFLOP/s",
    )
    for sentence in facts["notices"]:
        _say(console, f"[yellow]{sentence}[/]")


def _say(console: Console, text: str, *, markup: bool = True) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=markup)


def parse_peers(text: str) -> Sequence[str]:
    """Returns the peers named in "hf,liger"; raises ConfigError for an unknown one."""
    return peers.parse(text)
