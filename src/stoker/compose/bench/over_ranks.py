"""Measures a run over several processes, with the plan, the loading, the strategy and the steps of `stoker train`."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from rich.console import Console

from stoker.compose import planned, train
from stoker.compose.bench import rows
from stoker.compose.bench.measure import WARMUP_STEPS, timed, wait
from stoker.compose.bench.result import Measured
from stoker.compose.hardware import probe
from stoker.compose.model import fitted, load_tokenizer, open_base
from stoker.config.schema import RunConfig
from stoker.distributed.ranks import Ranks
from stoker.plan.plan import Plan

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Run(Generic[_Found]):
    """What was measured, the plan of one process, the device, and what was found by looking at one more step."""

    measured: Measured
    plan: Plan
    device: torch.device
    found: _Found | None


def measure(
    config: RunConfig,
    ranks: Ranks,
    *,
    steps: int,
    console: Console,
    look: Callable[[Callable[[], object], torch.device], _Found] | None = None,
) -> Run[_Found]:
    """Takes steps on random rows; every rank must call it. `model.base` is a folder, or the id of a model on the Hub.

    What the plan says does not fit in memory is tried all the same. `look` is that of `measure.timed`.

    Raises:
        UserError: something the user can mend. TrainingError: loss or gradient make no sense, or memory ran out.
    """
    base = open_base(config.model.base)
    config = fitted(config, base)
    data = rows.random_data(config, base.spec.vocab_size, steps=WARMUP_STEPS + steps)
    plan = ranks.share(
        lambda: planned.choose(config, base, data, probe(), None, world_size=ranks.world_size, force=True)
    )
    console.print(plan.table(), highlight=False, markup=False, soft_wrap=True)
    start = time.perf_counter()
    model = train.Model(base, load_tokenizer(base))
    engine = train.load_engine(config, plan, model, data, console, ranks=ranks)
    device = engine.strategy.device
    wait(device)
    load_seconds = time.perf_counter() - start
    measured, _, found = timed(config, engine, steps=steps, look=look)
    return Run(replace(measured, load_seconds=load_seconds), plan, device, found)
