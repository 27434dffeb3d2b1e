"""A survey for people and for machines: the table, the recommendation, the formulas with their numbers, and JSON."""

from collections.abc import Sequence
from typing import Any

from stoker.plan import catalogue, speed
from stoker.plan.memory import GIB, VALUE_BYTES, optimizer_bytes
from stoker.plan.plan import size
from stoker.plan.survey import METHOD_NAMES, Offer, Request, Verdict, pareto

COLUMNS = ("device", "method", "batch", "memory", "host", "disk", "s/step", "tokens/s", "hours", "cost", "")


def table(offers: Sequence[Offer], *, at_most: int | None = None) -> str:
    """Returns the offers that fit as aligned lines, by time; `*` marks those that none beats in time and cost."""
    fitting = [one for one in offers if one.fits]
    best = pareto(fitting)
    shown = fitting if at_most is None else fitting[:at_most]
    shown += [one for one in best if one not in shown]
    rows = [COLUMNS, *(_row(one, "*" if one in best else "") for one in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    right = {"s/step", "tokens/s", "hours", "cost", "disk", "host"}
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if COLUMNS[index] in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    left = len(fitting) - len(shown)
    return "\n".join([*lines, *([f"and {left} more that fit (--all)"] if left > 0 else [])])


def _row(one: Offer, mark: str) -> tuple[str, ...]:
    plan, step = one.plan, one.step
    assert plan is not None
    assert step is not None
    return (
        f"{one.device.name}{' ' + mark if mark else ''}",
        METHOD_NAMES[one.method],
        f"{plan.micro_batch_size} x {plan.accumulation_steps}",
        f"{plan.memory.total / GIB:.1f} of {plan.available_bytes / GIB:.1f} GiB",
        size(one.host_bytes),
        size(one.disk_bytes),
        f"{step.seconds:.3g}",
        f"{one.tokens_per_second:,.0f}",
        "?" if one.hours is None else f"{one.hours:,.2f}",
        "?" if one.usd is None else f"${one.usd:,.2f}",
        one.why,
    )


def misfits(offers: Sequence[Offer]) -> list[str]:
    """Returns a sentence for each device on which nothing fits."""
    keys = dict.fromkeys(one.device.key for one in offers)
    said = []
    for key in keys:
        here = [one for one in offers if one.device.key == key]
        if not any(one.fits for one in here):
            # What lacks memory says more than a method that the device cannot do at all.
            short = [one for one in here if one.why.startswith("the run needs")]
            said.append(f"{here[0].device.name}: {(short or here)[-1].why}")
    return said


def summary(request: Request, found: Verdict) -> list[str]:
    """Returns the recommendation, why the next lost, and what would change the answer."""
    if found.best is None:
        return [found.because, *found.would_change]
    best, plan = found.best, found.best.plan
    assert plan is not None
    money = "" if best.usd is None else f", ${best.usd:,.2f}"
    run = f" ({best.hours:,.2f} h{money})" if best.hours is not None else ""
    how = f"micro-batch {plan.micro_batch_size} x {plan.accumulation_steps}, {plan.recompute}"
    lines = [f"Recommended: {best.name}{run}: {found.because}. It runs {how}, in {plan.precision}."]
    if found.runner_up:
        lines.append(f"Next: {found.runner_up}.")
    lines += [f"What would change this: {sentence}." for sentence in found.would_change]
    return lines


def notes(request: Request, offers: Sequence[Offer]) -> list[str]:
    """Returns what the figures rest on."""
    work = offers[0].work
    steps = "an unknown number of steps (train.steps or --rows say it)"
    if work.steps is not None:
        steps = f"{work.steps:,} steps of {request.config.train.batch_size} x {work.rows.tokens:,.0f} tokens"
    filled = f", filled to {work.fill:.0%}, {work.rows.trained_share:.0%} trained"
    found = [f"Work: {steps}{filled}. Data: {work.source}."]
    found.append(f"Efficiencies: {request.efficiencies.source}. One device; this version trains on one.")
    if any(one.fits and one.method == "fp8" for one in offers):
        share = f"{request.efficiencies.matmul_fp8:.2f} of their rate"
        found.append(f"fp8 products inside a step are assumed to reach {share}: not measured yet.")
    if any(one.device.basis in ("derived", "arithmetic") for one in offers):
        found.append("Rates of some devices are derived, not published (gpus.toml says which).")
    priced = sorted({(one.device.price.date, one.device.price.kind) for one in offers if one.device.price})
    if priced:
        kinds = ", ".join(sorted({kind for _, kind in priced}))
        found.append(f"Prices: list prices ({kinds}) of {priced[0][0]} to {priced[-1][0]}; --gpus takes yours.")
    return found


def to_dict(request: Request, offers: Sequence[Offer], found: Verdict) -> dict[str, Any]:
    """Returns everything as JSON values."""
    line = pareto(offers)
    return {
        "model": {"base": request.config.model.base, "family": request.spec.family},
        "work": _work(offers[0]) if offers else {},
        "efficiencies": dict(vars(request.efficiencies)),
        "offers": [_offer(one, one in line) for one in offers],
        "recommended": None if found.best is None else found.best.name,
        "because": found.because,
        "runner_up": None if found.second is None else found.second.name,
        "runner_up_lost": found.runner_up,
        "would_change": list(found.would_change),
        "notes": notes(request, offers) if offers else [],
    }


def _work(one: Offer) -> dict[str, Any]:
    work = one.work
    return {
        "steps": work.steps,
        "sequences": work.sequences,
        "fill": work.fill,
        "source": work.source,
        "tokens_per_row": work.rows.tokens,
        "document_tokens": work.rows.document_tokens,
        "trained_share": work.rows.trained_share,
    }


def _offer(one: Offer, is_pareto: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": one.name,
        "device": catalogue.facts(one.device),
        "method": one.method,
        "fits": one.fits,
        "why": one.why,
        "pareto": is_pareto,
    }
    if one.plan is None or one.step is None:
        return values
    return values | {
        "plan": one.plan.to_dict(),
        "memory_bytes": one.memory(),
        "available_bytes": one.plan.available_bytes,
        "host_bytes": one.host_bytes,
        "disk_bytes": one.disk_bytes,
        "step_seconds": one.step.seconds,
        "step_parts": one.step.parts(),
        "hidden_seconds": dict(one.step.hidden),
        "tokens_per_second": one.tokens_per_second,
        "hours": one.hours,
        "usd": one.usd,
        "usd_per_step": one.usd_per_step,
    }


CATEGORIES = (
    *("weights", "adapters", "gradients", "optimizer", "activations", "logits", "dequantisation", "transposed"),
    *("communication", "context", "fragmentation", "time", "cost", "disk"),
)


def explain(request: Request, one: Offer, category: str) -> str:
    """Returns the formula of a category with its numbers, for an offer that fits."""
    plan, step = one.plan, one.step
    assert plan is not None
    assert step is not None
    config, spec, memory = one.config, request.spec, one.memory()
    trained, value = plan.num_trained_parameters, VALUE_BYTES[plan.precision]
    tokens = plan.micro_batch_size * plan.row_tokens
    formulas = {
        "weights": f"{plan.num_parameters - (trained if config.adapter else 0):,} values, {plan.quantization}: linear "
        f"layers in that format, the rest {value} bytes each"
        + ("" if config.adapter else "; trained ones in their own type with copies to compute with"),
        "adapters": f"{trained:,} trained values, with copies of {value} bytes to compute with where they are fp32",
        "gradients": f"one for each of {trained:,} trained values, in their type",
        "optimizer": f"{config.train.optimizer.kind}: {optimizer_bytes(config.train.optimizer):g} bytes for each of "
        f"{trained:,} fp32 values",
        "activations": f"{tokens:,} tokens (micro-batch {plan.micro_batch_size} x {plan.row_tokens:,}) x {value} bytes "
        f"through {len(spec.layers)} layers that {plan.recompute}, at the backward's peak",
        "logits": f"chunks of logits over {spec.vocab_size:,} words and their gradient, at most 256 MiB, and "
        f"{tokens:,} x {spec.hidden_size:,} x 4 of hidden states",
        "dequantisation": f"the largest weight once in {value} bytes a value"
        if plan.quantization != "none"
        else "none",
        "transposed": "a byte for each fp8 weight, transposed, where memory is left"
        if plan.keep_transposed
        else "none",
        "communication": "one device: none",
        "context": "CUDA's context and cuBLAS' workspaces, or PyTorch's libraries on a CPU (rule of thumb)",
        "fragmentation": "5% of all else: freed blocks of odd sizes (rule of thumb)",
    }
    if category in formulas:
        return f"{category} on {one.name}: {size(memory[category])} = {formulas[category]}"
    if category == "time":
        parts = step.parts().items()
        lines = [f"time on {one.name}: {step.seconds:.4g} s a step"]
        lines += [
            f"  {name:<12} {seconds:10.4g} s  {seconds / step.seconds:6.1%}" for name, seconds in parts if seconds
        ]
        lines += [f"  hidden behind it: {name} {seconds:.4g} s" for name, seconds in step.hidden.items() if seconds]
        rate = one.device.rates.get(plan.precision, one.device.rates["fp32"])
        found = request.efficiencies
        lines.append(
            f"  products at {found.matmul:.2f} x {rate / 1e12:,.0f} TFLOP/s, memory at {found.bandwidth:.2f} x "
            f"{one.device.bandwidth / 1e9:,.0f} GB/s; efficiencies: {found.source}"
        )
        return "\n".join(lines)
    if category == "cost":
        price = one.device.price
        if price is None or one.hours is None:
            return f"cost on {one.name}: not known ({'no price' if price is None else 'no number of steps'})"
        start = speed.start_seconds(spec, request.efficiencies)
        return (
            f"cost on {one.name}: ({one.work.steps:,} steps x {step.seconds:.4g} s + {start:.0f} s to start) / 3600 x "
            f"${price.usd_per_hour:.2f} an hour ({price.kind}, {price.date}) = ${one.usd:,.2f}"
        )
    return (
        f"disk on {one.name}: {size(one.disk_bytes)} = (weights and optimiser state of {trained:,} trained values) x "
        f"(keep_last {config.output.keep_last} + the best) + what is saved at the end"
    )
