"""What more devices would gain: the best strategy for each number of them, beside one."""

from collections.abc import Sequence
from dataclasses import dataclass

from stoker.plan.survey import Offer, simplest


@dataclass(frozen=True)
class Scaled:
    """A number of devices. `speed_up` over the fewest that the run fits on; `efficiency`: that a device."""

    num_devices: int
    nodes: int
    strategy: str
    step_seconds: float
    tokens_per_second: float
    speed_up: float
    efficiency: float
    communication_share: float
    hours: float | None
    usd: float | None


def scaling(of: Offer, offers: Sequence[Offer]) -> list[Scaled]:
    """Returns what the method of an offer takes on each number of its device, by the fastest strategy that fits."""
    best = {
        one.num_devices: one for one in simplest(offers) if (one.device.key, one.method) == (of.device.key, of.method)
    }
    if not best:
        return []
    least = best[min(best)]
    made = []
    for count, one in sorted(best.items()):
        assert one.step is not None
        assert least.step is not None
        gain = least.step.seconds / one.step.seconds
        made.append(
            Scaled(
                count,
                one.spread.nodes,
                one.spread.name,
                one.step.seconds,
                one.tokens_per_second,
                gain,
                gain * least.num_devices / count,
                one.step.communication / one.step.seconds,
                one.hours,
                one.usd,
            )
        )
    return made


def lines(of: Offer, offers: Sequence[Offer]) -> list[str]:
    """Returns the same for people; nothing where there is one number alone."""
    made = scaling(of, offers)
    if len(made) < 2:
        return []
    rows = [("devices", "strategy", "s/step", "tokens/s", "speed-up", "efficiency", "communication", "hours", "cost")]
    rows += [
        (
            f"{one.num_devices}" + (f" ({one.nodes} nodes)" if one.nodes > 1 else ""),
            one.strategy,
            f"{one.step_seconds:.3g}" if one.step_seconds < 100 else f"{one.step_seconds:,.0f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.speed_up:.2f} x",
            f"{one.efficiency:.0%}",
            f"{one.communication_share:.0%}",
            "?" if one.hours is None else f"{one.hours:,.2f}",
            "?" if one.usd is None else f"${one.usd:,.2f}",
        )
        for one in made
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [f"More of {of.device.name}, {of.method}, by formula:", *(_aligned(row, widths) for row in rows)]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Words on the left, numbers on the right."""
    left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
    right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right])
