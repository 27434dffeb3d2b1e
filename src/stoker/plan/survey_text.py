"""A survey for people and for machines: the table, the recommendation, and JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stoker.plan import catalogue
from stoker.plan.memory import GIB
from stoker.plan.plan import Plan, size
from stoker.plan.reported import REPORTED
from stoker.plan.scaling import scaling
from stoker.plan.survey import METHOD_NAMES, Offer, Request, simplest, ways_of
from stoker.plan.timeline import timeline
from stoker.plan.verdict import Verdict, pareto

# Candidates whose memory is told through a step.
_TIMELINES = 6
COLUMNS = ("device", "method", "batch", "memory", "host", "disk", "s/step", "tokens/s", "hours", "cost", "")


def table(offers: Sequence[Offer], *, at_most: int | None = None) -> str:
    """Returns the offers that fit as aligned lines, by time; `*` marks those that none beats in time and cost."""
    fitting = [one for one in offers if one.fits]
    best = pareto(simplest(fitting))
    if at_most is not None:
        fitting = simplest(fitting)
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
    left = sum(one.fits for one in offers) - len(shown)
    return "\n".join([*lines, *([f"and {left} more that fit (--all)"] if left > 0 else [])])


def _row(one: Offer, mark: str) -> tuple[str, ...]:
    plan, step = one.plan, one.step
    assert plan is not None
    assert step is not None
    return (
        f"{one.devices}{' ' + mark if mark else ''}",
        METHOD_NAMES[one.method] + ("" if one.num_devices == 1 else f", {one.spread.name}"),
        f"{plan.micro_batch_size} x {plan.accumulation_steps}",
        f"{plan.memory.total / GIB:.1f} of {plan.available_bytes / GIB:.1f} GiB",
        size(one.host_bytes),
        size(one.disk_bytes),
        f"{step.seconds:.3g}" if step.seconds < 100 else f"{step.seconds:,.0f}",
        f"{one.tokens_per_second:,.0f}",
        "?" if one.hours is None else f"{one.hours:,.2f}",
        "?" if one.usd is None else f"${one.usd:,.2f}",
        one.why,
    )


def misfits(offers: Sequence[Offer]) -> list[str]:
    """Returns a sentence for each device of which no number has a method that fits."""
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
    how = f"micro-batch {plan.micro_batch_size} x {plan.accumulation_steps}, {plan.ladder.words}{_gathering(plan)}"
    lines = [f"Recommended: {best.name}{run}: {found.because}. It runs {how}, in {plan.precision}."]
    if found.runner_up:
        lines.append(f"Next: {found.runner_up}.")
    lines += [f"What would change this: {sentence}." for sentence in found.would_change]
    return lines


def _gathering(plan: Plan) -> str:
    """Says when FSDP2 lets go of a layer that it gathered; "" under another strategy."""
    if plan.reshards is None:
        return ""
    if plan.reshards:
        return ", layers are let go after their forward and gathered again (reshard_after_forward)"
    return ", layers stay gathered until their backward"


def notes(request: Request, offers: Sequence[Offer]) -> list[str]:
    """Returns what the figures rest on."""
    work = offers[0].work
    steps = "an unknown number of steps (train.steps or --rows say it)"
    if work.steps is not None:
        plural = "" if work.steps == 1 else "s"
        batch_size = request.config.train.batch_size
        steps = f"{work.steps:,} step{plural} of {batch_size} x {work.rows.tokens:,.0f} tokens"
    filled = f", filled to {work.fill:.0%}, {work.rows.trained_share:.0%} trained"
    found = [f"Work: {steps}{filled}. Data: {work.source}."]
    sources = dict.fromkeys(request.figures_of(one.device).source for one in offers)
    found += [f"Efficiencies: {source}." for source in sources]
    for device in {one.device.key: one.device for one in offers if one.device.basis == REPORTED}.values():
        found.append(
            f"{device.name} is not in the catalogue: its rates are {device.source}. That is a coarser estimate; "
            "stoker doctor --calibrate measures this machine."
        )
    if any(one.num_devices > 1 for one in offers):
        found.append("Several devices: links and overlap by formula, with rules of thumb; two H200 were measured.")
        kinds = {(one.device.key, one.method) for one in offers if one.device.vendor != "cpu"}
        if sum(one.device.vendor != "cpu" for one in offers) < len(kinds) * len(ways_of(request)):
            found.append(
                "Strategies that can be no faster than a simpler one that fits were left out (--all has them)."
            )
    if request.nodes * request.per_node > 1 and any(one.device.vendor == "cpu" for one in offers):
        found.append("--nodes and --gpus-per-node are for GPUs: a CPU is planned for alone.")
    if (size := request.config.engine.context_parallel) > 1:
        found.append(f"engine.context_parallel = {size}: so many devices share each row, and wait for every exchange.")
    if any(one.device.basis in ("derived", "arithmetic") for one in offers):
        found.append("Rates of some devices are derived, not published (gpus.toml says which).")
    prices = [one.device.price for one in offers if one.device.price is not None]
    dates = sorted({price.date for price in prices if price.kind != "yours"})
    if dates:
        kinds = ", ".join(sorted({price.kind for price in prices}))
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        found.append(f"Prices: list prices ({kinds}) of {when}; --gpus takes yours.")
    return found


def to_dict(request: Request, offers: Sequence[Offer], found: Verdict) -> dict[str, Any]:
    """Returns everything as JSON values."""
    line = pareto(simplest(offers))
    plain = simplest(offers)
    return {
        "model": {"base": request.config.model.base, "family": request.spec.family},
        "work": _work(offers[0]) if offers else {},
        "efficiencies": asdict(request.efficiencies),
        "offers": [_offer(one, is_pareto=one in line, is_simplest=one in plain) for one in offers],
        "timelines": _timelines(found, line),
        "recommended": None if found.best is None else found.best.name,
        "because": found.because,
        "runner_up": None if found.second is None else found.second.name,
        "runner_up_lost": found.runner_up,
        "would_change": list(found.would_change),
        "scaling": [] if found.best is None else [vars(one) for one in scaling(found.best, offers)],
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


def _timelines(found: Verdict, line: Sequence[Offer]) -> list[dict[str, Any]]:
    """What a device holds through a step, for the candidates that matter: recommended, next, none better in both."""
    chosen = [one for one in (found.best, found.second, *line) if one is not None]
    distinct = list({id(one): one for one in chosen}.values())[:_TIMELINES]
    return [
        {
            "name": one.name,
            "available_bytes": one.plan.available_bytes,
            "moments": [{"phase": m.phase, "label": m.label, "bytes": dict(m.bytes)} for m in timeline(one)],
        }
        for one in distinct
        if one.plan is not None
    ]


def _offer(one: Offer, *, is_pareto: bool, is_simplest: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": one.name,
        "device": catalogue.facts(one.device),
        "num_devices": one.num_devices,
        "nodes": one.spread.nodes,
        "strategy": one.spread.name,
        "method": one.method,
        "fits": one.fits,
        "why": one.why,
        "pareto": is_pareto,
        "simplest": is_simplest,
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
