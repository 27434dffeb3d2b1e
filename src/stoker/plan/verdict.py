"""Which of a survey's offers to take, why the next best lost, and what would make another answer right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stoker.errors import PlanError
from stoker.plan.choose import choose
from stoker.plan.memory import GIB
from stoker.plan.survey import Offer, Request, hardware_of, offer, simplest

# A quantised base changes the result a little: it must be this much better to be recommended over a plain one.
_QUANTISED_MUST_GAIN = 1.1
# How much faster something must be to be worth a sentence.
_WORTH_SAYING = 1.05
# A price so many times today's is no answer to "what would change this".
_NO_PRICE_GOES_SO_FAR = 10.0


@dataclass(frozen=True)
class Verdict:
    """The recommendation and its reasons, in sentences; `best` is None where nothing will do."""

    best: Offer | None
    second: Offer | None
    because: str
    runner_up: str
    would_change: tuple[str, ...]


def verdict(request: Request, offers: Sequence[Offer]) -> Verdict:
    """Returns what to do: the cheapest within a deadline, the fastest within a budget, else least time x cost."""
    fitting = simplest(offers)
    if not fitting:
        return Verdict(None, None, "Nothing fits on these devices.", "", tuple(_nearest(request, offers)))
    eligible = [one for one in fitting if _within(request, one)]
    if not eligible:
        return Verdict(None, None, _why_none(request, fitting), "", ())
    ranked = sorted(_worth_it(request, eligible), key=lambda one: _score(request, one, eligible))
    best = ranked[0]
    # Other devices, or another number, say more than another method on the same ones, which `_changes` speaks of.
    others = [one for one in ranked if (one.device.key, one.num_devices) != (best.device.key, best.num_devices)]
    second = next(iter([*others, *ranked[1:]]), None)
    rival = next((one for one in ranked if one.device.key != best.device.key), None)
    return Verdict(
        best,
        second,
        _because(request, eligible),
        "" if second is None else _lost(best, second),
        tuple(_changes(request, best, rival, fitting)),
    )


def pareto(offers: Sequence[Offer]) -> list[Offer]:
    """Returns the offers that no other beats in both time and cost, from the fastest to the cheapest."""
    priced = [one for one in offers if one.step and one.usd_per_step is not None]
    line: list[Offer] = []
    for one in sorted(priced, key=lambda one: (one.step.seconds if one.step else 0.0, one.usd_per_step or 0.0)):
        if not line or (one.usd_per_step or 0.0) < (line[-1].usd_per_step or 0.0):
            line.append(one)
    return line


def _worth_it(request: Request, eligible: Sequence[Offer]) -> Sequence[Offer]:
    """Returns the offers without those of several devices where one is as fast or, with no deadline or budget, cheaper.

    Where no price is known, or money is there for it, several need only be faster.
    """
    alone = [one for one in eligible if one.num_devices == 1]
    if not alone:
        return eligible
    seconds = min(one.step.seconds for one in alone if one.step)
    prices = [one.usd_per_step for one in alone if one.usd_per_step is not None]
    asks_for_money = request.budget_usd is None and request.deadline_hours is None

    def is_worth_it(one: Offer) -> bool:
        if one.num_devices == 1:
            return True
        if one.step is None or one.step.seconds >= seconds:
            return False
        return not (asks_for_money and prices and (one.usd_per_step is None or one.usd_per_step >= min(prices)))

    return [one for one in eligible if is_worth_it(one)]


def _within(request: Request, one: Offer) -> bool:
    if request.deadline_hours is not None and (one.hours is None or one.hours > request.deadline_hours):
        return False
    return request.budget_usd is None or (one.usd is not None and one.usd <= request.budget_usd)


def _score(request: Request, one: Offer, among: Sequence[Offer]) -> tuple[bool, float]:
    """What is least for the best offer; those without a price come after those with one."""
    assert one.step is not None
    penalty = _QUANTISED_MUST_GAIN if one.method in ("nf4", "int8", "fp8") else 1.0
    seconds, usd = one.step.seconds, one.usd_per_step
    if all(other.usd_per_step is None for other in among):
        return False, penalty * seconds
    if usd is None:
        return True, penalty * seconds
    if request.deadline_hours is not None:
        return False, penalty * usd
    return False, penalty * (seconds if request.budget_usd is not None else seconds * usd)


def _because(request: Request, eligible: Sequence[Offer]) -> str:
    if all(one.usd_per_step is None for one in eligible):
        return "the fastest; no price is known"
    if request.deadline_hours is not None:
        budget = f" and ${request.budget_usd:,.2f}" if request.budget_usd is not None else ""
        return f"the cheapest within {request.deadline_hours:g} h{budget}"
    if request.budget_usd is not None:
        return f"the fastest within ${request.budget_usd:,.2f}"
    return "least time x cost; --deadline asks for the cheapest in time, --budget for the fastest for the money"


def _why_none(request: Request, fitting: Sequence[Offer]) -> str:
    timed = [one for one in fitting if one.hours is not None]
    if not timed:
        return "How long the run is is not known, so neither is whether it keeps to a deadline or a budget."
    fastest = min(timed, key=lambda one: one.hours or 0.0)
    cheapest = min((one for one in timed if one.usd is not None), key=lambda one: one.usd or 0.0, default=None)
    money = f"; the cheapest is {cheapest.name} for ${cheapest.usd:,.2f}" if cheapest else "; no price is known"
    return f"Nothing keeps to that: the fastest is {fastest.name} in {fastest.hours:,.2f} h{money}."


def _lost(best: Offer, second: Offer) -> str:
    assert best.step is not None
    assert second.step is not None
    ratio = second.step.seconds / best.step.seconds
    time = f"takes {ratio:.2f} x the time" if ratio >= 1 else f"takes {ratio:.2f} x the time, which is less,"
    if best.usd_per_step and second.usd_per_step:
        return f"{second.name} {time} and {second.usd_per_step / best.usd_per_step:.2f} x the money"
    return f"{second.name} {time}" + (" and has no price here" if second.usd_per_step is None else "")


def _changes(request: Request, best: Offer, rival: Offer | None, fitting: Sequence[Offer]) -> list[str]:
    """Sentences on what would make another answer right; `rival`: the best of another kind of device."""
    said = []
    if (more := _with_more_memory(request, best)) is not None:
        said.append(more)
    if rival is not None and best.usd_per_step and rival.usd_per_step and request.budget_usd is None:
        price = best.device.price
        assert price is not None
        factor = _score(request, rival, [best])[1] / _score(request, best, [best])[1]
        if factor < _NO_PRICE_GOES_SO_FAR:
            here = f"here ${price.usd_per_hour:.2f}, {price.kind}, {price.date}"
            limit = f"above ${price.usd_per_hour * factor:.2f} an hour for each {best.device.name} ({here})"
            said.append(f"{limit}, {rival.name} would win")
    same = [one for one in fitting if (one.device.key, one.num_devices) == (best.device.key, best.num_devices)]
    plain = next((one for one in same if one.method == "lora"), None)
    if best.method not in ("full", "lora") and plain is not None and plain.step and best.step:
        said.append(
            f"to leave the base as it is: {plain.name}, {plain.step.seconds / best.step.seconds:.2f} x the time"
        )
    fastest = min(fitting, key=lambda one: one.step.seconds if one.step else 0.0)
    if fastest is not best and fastest.step and best.step:
        hours = f" in {fastest.hours:,.2f} h" if fastest.hours is not None else ""
        gain = best.step.seconds / fastest.step.seconds
        if gain > _WORTH_SAYING:
            said.append(f"if only time counts: {fastest.name}, {gain:.1f} x faster{hours}")
    return said


def _with_more_memory(request: Request, best: Offer) -> str | None:
    """What the device could do if its memory were no limit, where that changes anything."""
    plan = best.plan
    if plan is None or best.step is None or set(plan.keep) == {"all"}:
        return None
    roomy = replace(best.device, memory_bytes=1024 * GIB)
    roomier = offer(request, roomy, best.method, best.spread)
    if roomier.plan is None or roomier.step is None or roomier.step.seconds > 0.98 * best.step.seconds:
        return None
    need = roomier.plan.memory.total / GIB
    return (
        f"with {need:,.0f} GiB nothing would be computed again: {best.step.seconds / roomier.step.seconds:.2f} x faster"
    )


def _nearest(request: Request, offers: Sequence[Offer]) -> list[str]:
    """What would fit, by the advice that `choose` gives on the largest of the devices."""
    if not offers:
        return []
    largest = max(offers, key=lambda one: one.device.memory_bytes)
    try:
        choose(largest.config, request.spec, hardware_of(request, largest.device), statistics=request.statistics)
    except PlanError as error:
        return [f"{largest.device.name}: {problem.fix}" for problem in error.problems if problem.fix]
    return []
