"""Which process, which micro-batch and which rows made a step's loss something that is no number."""

import math
from collections.abc import Callable, Sequence

from stoker.distributed.strategy import Result, Strategy

_SHOWN = 8


def name_culprits(strategy: Strategy, results: Sequence[Result], rows: Callable[[], Sequence[Sequence[int]]]) -> str:
    """Returns where losses are not finite, over all ranks, as a sentence's end; every rank must call it.

    `rows` are the examples of each micro-batch of this rank, where they are known. "" when each loss by itself is
    finite.
    """
    bad = [place for place, result in enumerate(results) if not math.isfinite(float(result.loss_sum))]
    mine = _describe(bad, len(results), rows()) if bad else ""
    found = [(rank, text) for rank, text in enumerate(strategy.gather_over_ranks(mine)) if text]
    if strategy.world_size == 1:
        return "".join(f" It comes from {text}." for _, text in found)
    return "".join(f" On rank {rank} it comes from {text}." for rank, text in found)


def _describe(bad: Sequence[int], count: int, rows: Sequence[Sequence[int]]) -> str:
    text = f"micro-batch {', '.join(str(place + 1) for place in bad)} of {count}"
    if not any(rows):
        return text
    # Micro-batches that were split for want of memory no longer stand at their places: then all of the step's.
    chosen = [rows[place] for place in bad] if len(rows) == count else rows
    held = [example for part in chosen for example in part]
    shown = ", ".join(map(str, held[:_SHOWN]))
    more = f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else ""
    return f"{text}: documents {shown}{more} of the prepared data, which `stoker inspect -n {max(held) + 1}` shows"
