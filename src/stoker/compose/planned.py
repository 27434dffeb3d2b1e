"""The plan of a run: for all its processes the same, and for a run that goes on as it was where results hang on it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stoker.compose import parallel, resume
from stoker.compose.data import Data
from stoker.compose.model import Base
from stoker.compose.run_folder import RunFolder
from stoker.config import deepspeed
from stoker.config.schema import RunConfig
from stoker.errors import PlanError
from stoker.plan import limits
from stoker.plan.choose import MemoryPlanError, Statistics
from stoker.plan.hardware import Hardware
from stoker.plan.many import choose_over
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    from stoker.distributed.ranks import Ranks

# What of a plan is its ladder.
_LADDER = ("layers", "recompute", "tile_tokens", "offload_activations")


def agreed(
    config: RunConfig,
    base: Base,
    data: Data,
    hardware: Hardware,
    ranks: "Ranks",
    *,
    resumed: RunFolder | None,
    force: bool,
) -> Plan:
    """Returns the plan, which the first process makes for all; the error for what does not fit points to --force."""
    asked = {"world_size": ranks.world_size, "force": force}
    try:
        return ranks.share(lambda: choose(config, base, data, hardware, resumed, **asked))
    except MemoryPlanError as error:
        raise MemoryPlanError(
            [replace(one, fix=f"{one.fix} --force tries it as it is.") for one in error.problems]
        ) from None


def choose(
    config: RunConfig,
    base: Base,
    data: Data,
    hardware: Hardware,
    resumed: RunFolder | None,
    *,
    world_size: int,
    force: bool,
) -> Plan:
    """Returns the plan; that of a resumed run keeps the choices that its results depend on in their last bits."""
    if problems := limits.problems(config, base.spec):
        raise PlanError([problem for _, problem in problems])
    config = parallel.share_of_one(config, world_size)
    spread: dict[str, Any] = {"num_processes": world_size, "per_node": parallel.processes_here(world_size)}
    if config.engine.strategy == "deepspeed":
        spread["stages"] = (deepspeed.stage(config.engine.deepspeed),)
    plan = _for_one(config, base, data, hardware, resumed=resumed, asked={**spread, "force": force})
    return parallel.spread(plan, config, world_size)


def _for_one(
    config: RunConfig,
    base: Base,
    data: Data,
    hardware: Hardware,
    *,
    resumed: RunFolder | None,
    asked: Mapping[str, Any],
) -> Plan:
    statistics = Statistics(-(-data.longest // config.engine.context_parallel))
    plan = choose_over(config, base.spec, hardware, statistics=statistics, **asked)
    if resumed is None:
        return plan
    before = resume.engine_before(config, resumed, plan.device_name)
    ladder = resume.ladder_before(config, resumed, plan.device_name)
    engine = config.engine.model_copy(update=before)
    fixed = config.model_copy(update={"engine": engine})
    plan = choose_over(fixed, base.spec, hardware, statistics=statistics, ladder=ladder, **asked)
    same = [*before, *(_LADDER if ladder is not None and plan.ladder == ladder else ())]
    return replace(plan, reasons={**plan.reasons, **dict.fromkeys(same, "as when the run began")})
