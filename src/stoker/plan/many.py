"""Chooses how a run is spread over the devices that it is given: a plan for each strategy, and the fastest of them."""

from collections.abc import Sequence
from typing import Any

from stoker.arch.borrowed import AnySpec
from stoker.config.schema import Engine, RunConfig
from stoker.errors import PlanError
from stoker.plan import rates, speed
from stoker.plan.choose import choose
from stoker.plan.hardware import Hardware
from stoker.plan.plan import Plan
from stoker.plan.spread import SINGLE, Spread, beyond_sharing, configured, spreads

# What `auto` chooses from when it trains; DeepSpeed is an extra, and is taken where it is asked for.
_AUTO = ("ddp", "fsdp2")
_AS_FAST = 1.02
"""A strategy must be faster by more than this than one before it in the list, which is the simpler one."""


def choose_over(
    config: RunConfig,
    spec: AnySpec,
    hardware: Hardware,
    *,
    num_processes: int = 1,
    per_node: int | None = None,
    stages: Sequence[int] = (3,),
    **options: Any,
) -> Plan:
    """Returns the plan of a run over `num_processes` devices, `per_node` of them in a node (None: all in one).

    `config` has the rows of one of them; engine.strategy says which strategies there are to choose from, and `stages`
    which of ZeRO. `options` are those of `choose`, but for its spread.

    Raises:
        PlanError: no strategy fits, with what the last of them lacks.
    """
    force = options.pop("force", False)
    ways = _ways(config, num_processes, per_node or num_processes, stages)
    plans: list[tuple[Plan, float]] = []
    refused: PlanError | None = None
    for way in ways:
        if way.strategy == "fsdp2" and len(ways) > 1 and config.engine.precision == "fp16":
            continue  # it has none
        try:
            plan = choose(config, spec, hardware, spread=way, **options)
        except PlanError as error:
            refused = error
            continue
        plans.append((plan, _seconds(config, spec, plan, hardware)))
    if not plans and force:
        return choose(config, spec, hardware, spread=ways[-1], force=True, **options)
    if not plans:
        assert refused is not None
        raise refused
    fastest = min(seconds for _, seconds in plans)
    return next(plan for plan, seconds in plans if seconds <= _AS_FAST * fastest)


def does_more(engine: Engine) -> bool:
    """Whether the strategy that was asked for does something for one device alone, which has nothing to share.

    Where it does not, it would only copy what is trained, so that one device runs as `single`; its checkpoints resume
    on many.
    """
    return bool(beyond_sharing(engine))


def _ways(config: RunConfig, num_processes: int, per_node: int, stages: Sequence[int]) -> list[Spread]:
    asked = config.engine.strategy
    if num_processes == 1 and not does_more(config.engine):
        return [SINGLE]
    found = spreads(num_processes, per_node, asked=asked, stages=tuple(stages))
    return [configured(way, config) for way in found if asked != "auto" or way.strategy in _AUTO]


def _seconds(config: RunConfig, spec: AnySpec, plan: Plan, hardware: Hardware) -> float:
    device = hardware.first(plan.device)  # type: ignore[arg-type]
    assert device is not None
    known = rates.of(device, num_threads=hardware.num_threads)
    rows = speed.Rows(plan.row_tokens, plan.sharing * plan.row_tokens)
    return speed.step(config, spec, plan, known.device, rows=rows, efficiencies=known.efficiencies).seconds
