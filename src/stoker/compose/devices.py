"""How many of a machine's GPUs a run should take, decided before any process of it begins."""

from collections.abc import Sequence

from stoker.compose import hardware, parallel
from stoker.config.schema import RunConfig
from stoker.errors import PlanError
from stoker.plan import many, rates, speed
from stoker.plan.hardware import Device, Hardware

# A larger number of GPUs must make a step faster by more than this.
_AS_FAST = 1.03


def planned_processes(config: RunConfig, gpus: Sequence[Device]) -> tuple[int, str]:
    """Returns how many processes the run should have on these GPUs, and a sentence that says why ("" if all is told).

    As few as take a step about as fast as any other number, and 1 where nothing is to choose.
    """
    from stoker.compose.model import fitted, open_base_of

    engine = config.engine
    if engine.num_processes is not None or engine.strategy == "single" or engine.device == "cpu" or len(gpus) < 2:
        return engine.num_processes or 1, ""
    if config.data.streaming or config.data.prepare == "overlap":
        return 1, f"One of {len(gpus)} GPUs: rows that are prepared during training are for one process."
    base = open_base_of(config)
    config = fitted(config, base)
    smallest = min(gpus, key=lambda one: one.memory_bytes)
    machine = Hardware((smallest, hardware.host()), num_threads=1)
    found: dict[int, float] = {}
    for count in range(1, len(gpus) + 1):
        try:
            mine = parallel.share_of_one(config, count)
            plan = many.choose_over(mine, base.spec, machine, num_processes=count, advise=False)
        except PlanError:
            continue
        rows = speed.Rows(plan.row_tokens, plan.sharing * plan.row_tokens)
        figures = rates.of(smallest)
        step = speed.step(mine, base.spec, plan, figures.device, rows=rows, efficiencies=figures.efficiencies)
        found[count] = step.seconds
    if not found:
        return 1, ""  # whose plan says what is missing
    fastest = min(found.values())
    best = min(count for count, seconds in found.items() if seconds <= _AS_FAST * fastest)
    if 1 not in found:
        why = "it does not fit on fewer" if best == min(found) else "fewer would be slower"
    elif best == 1:
        why = "more would not make a step faster"
    else:
        why = f"a step takes {found[best]:.3g} s by the plan, {found[1]:.3g} s on one"
    return best, f"{best} of {len(gpus)} GPUs: {why} (engine.num_processes, --gpus)."
