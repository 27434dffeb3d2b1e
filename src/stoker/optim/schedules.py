"""Learning-rate schedules: pure functions from a step's index to a share of the highest rate.

A step's index counts from 0. Warm-up rises in a straight line from `1 / warmup_steps` at index 0 to 1 at index
`warmup_steps - 1`, so that no step is spent at a rate of zero (Transformers starts at zero, one step later). After
warm-up the shapes are those of Transformers: a decaying schedule would reach its floor at index `total_steps`, just
after the last step.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""From a step's index (from 0) to the share of the highest learning rate that this step uses."""

KINDS = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def constant(*, warmup_steps: int = 0) -> Schedule:
    """Returns 1 after warm-up."""
    return _after_warmup(warmup_steps, lambda index: 1.0)


def linear(total_steps: int, *, warmup_steps: int = 0, floor: float = 0.0) -> Schedule:
    """Returns `floor + (1 - floor) * (1 - progress)`, where progress runs from 0 (end of warm-up) to 1 (end of run)."""
    return _after_warmup(
        warmup_steps, lambda index: _above_floor(1.0 - _progress(index, warmup_steps, total_steps), floor)
    )


def cosine(total_steps: int, *, warmup_steps: int = 0, floor: float = 0.0) -> Schedule:
    """Returns `floor + (1 - floor) * (1 + cos(pi * progress)) / 2` after warm-up (arXiv:1608.03983)."""

    def share(index: int) -> float:
        progress = _progress(index, warmup_steps, total_steps)
        return _above_floor(0.5 * (1.0 + math.cos(math.pi * progress)), floor)

    return _after_warmup(warmup_steps, share)


def warmup_stable_decay(total_steps: int, *, decay_steps: int, warmup_steps: int = 0, floor: float = 0.0) -> Schedule:
    """Returns 1 after warm-up, then falls straight to `floor` over the last `decay_steps` (arXiv:2404.06395)."""
    decay_start = max(total_steps - decay_steps, warmup_steps)
    return _after_warmup(
        warmup_steps, lambda index: _above_floor(1.0 - _progress(index, decay_start, total_steps), floor)
    )


def inverse_sqrt(*, warmup_steps: int = 0) -> Schedule:
    """Returns `sqrt(w / index)` after warm-up of `w` steps, so that the curve leaves warm-up at 1 (arXiv:1706.03762).

    Without warm-up the time scale is 10,000 steps, as Transformers chooses: `sqrt(10000 / (index + 10000))`.
    """
    timescale = warmup_steps or 10_000
    return _after_warmup(warmup_steps, lambda index: math.sqrt(timescale / (index - warmup_steps + timescale)))


def build(
    kind: str,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    floor: float = 0.0,
    decay_steps: int | None = None,
) -> Schedule:
    """Returns the schedule named `kind` (one of `KINDS`); what a kind has no use for is refused.

    Raises:
        ValueError: the kind is unknown, a number is out of range, or an option does not belong to the kind.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps = {warmup_steps} is not between 0 and total_steps = {total_steps}")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor = {floor} is not between 0 and 1")
    if floor and kind in ("constant", "inverse_sqrt"):
        raise ValueError(f"the schedule {kind} has no floor")
    if (decay_steps is not None) != (kind == "wsd"):
        raise ValueError(f"decay_steps = {decay_steps} with the schedule {kind}: wsd needs it and no other takes it")
    match kind:
        case "constant":
            return constant(warmup_steps=warmup_steps)
        case "linear":
            return linear(total_steps, warmup_steps=warmup_steps, floor=floor)
        case "cosine":
            return cosine(total_steps, warmup_steps=warmup_steps, floor=floor)
        case "wsd":
            return warmup_stable_decay(
                total_steps, decay_steps=decay_steps or 0, warmup_steps=warmup_steps, floor=floor
            )
        case "inverse_sqrt":
            return inverse_sqrt(warmup_steps=warmup_steps)
        case _:
            raise ValueError(f"unknown schedule {kind!r}; the kinds are {', '.join(KINDS)}")


def _after_warmup(warmup_steps: int, share: Schedule) -> Schedule:
    return lambda index: (index + 1) / warmup_steps if index < warmup_steps else share(index)


def _progress(index: int, start: int, end: int) -> float:
    return min(1.0, (index - start) / max(1, end - start)) if index > start else 0.0


def _above_floor(share: float, floor: float) -> float:
    return floor + (1.0 - floor) * share
