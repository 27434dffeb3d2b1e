"""What may differ between a run and its continuation, and what would make it another run."""

from collections.abc import Iterator, Mapping
from typing import Any

from stoker.compose.run_folder import RunFolder
from stoker.config.load import load
from stoker.config.schema import RunConfig
from stoker.errors import ConfigError, Problem
from stoker.plan.ladder import Ladder

# A change of these would change what the steps so far have meant: their rows, or the weights that are trained.
_FIXED = (
    "model.base",
    "model.revision",
    "model.tokenizer",
    "model.chat_template",
    "model.overrides",
    "model.special_tokens",
    "model.new_tokens",
    "model.quantization",
    "adapter",
    "data",
    "task",
    "train.batch_size",
    "train.seed",
    "train.only",
    "train.weight_dtype",
    "train.optimizer.kind",
)
_EXACT = ("micro_batch_size", "precision", "kernels", "cuda_graphs", "num_threads")
_FREE = ("data.cache_folder", "data.on_bad_row", "data.num_workers")


def changes(config: RunConfig, folder: RunFolder) -> list[str]:
    """Returns a sentence for each setting that differs from the run in `folder` and may.

    Raises:
        ConfigError: a setting differs that would make it another run.
    """
    before = dict(_flat(load(folder.config).model_dump()))
    after = dict(_flat(config.model_dump()))
    different = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    different = [name for name in different if name not in _FREE and not name.startswith(("output.folder", "plan."))]
    fixed = [name for name in different if any(name == one or name.startswith(f"{one}.") for one in _FIXED)]
    if fixed:
        raise ConfigError(
            [
                Problem(
                    f"{name} was {before.get(name)!r} when this run began and is {after.get(name)!r} now.",
                    where=str(folder.config),
                    fix="Set it back to resume, or start a new run in another output.folder.",
                )
                for name in fixed
            ]
        )
    return [f"{name} changes from {before.get(name)!r} to {after.get(name)!r} from here on." for name in different]


def other_rows(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a sentence where the data is not what it was when the run began, by facts of both (`agree`)."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not before or not names:  # a run of before this was written down has no facts
        return []
    told = "; ".join(f"{name} was {before.get(name, 'none')} and is {now.get(name, 'none')}" for name in names)
    return [
        f"The data is not what the run began with: {told}. Its steps go on in the order of the new rows, some of which "
        "they may have seen; --overwrite starts anew."
    ]


def engine_before(config: RunConfig, folder: RunFolder, device_name: str) -> dict[str, Any]:
    """Returns what the plan chose when the run began, for the settings of `engine` that are `auto` and that results
    depend on in their last bits; nothing on another device, where no bit could be promised.

    What the plan chooses depends on the memory that is free, which may be another amount now. On another number of
    processes one's part of a step may be less than the micro-batch was, which is then chosen anew.
    """
    plan = _plan_before(folder, device_name)
    if config.train.batch_size % plan.get("micro_batch_size", 1):
        del plan["micro_batch_size"]
    return {name: plan[name] for name in _EXACT if name in plan and getattr(config.engine, name) == "auto"}


def ladder_before(config: RunConfig, folder: RunFolder, device_name: str) -> Ladder | None:
    """Returns the ladder of the plan when the run began, for the same reason; None where the user sets a part of it.

    Rungs alone change no bit, but tiles and layers that run op by op take sums in another order.
    """
    plan, asked = _plan_before(folder, device_name), config.engine
    if asked.recompute != "auto" or not {"keep", "layers", "tile_tokens", "offload_activations"} <= plan.keys():
        return None
    rungs, staying = tuple(plan["keep"]), plan.get("staying_layers", 0)
    before = Ladder(rungs, plan["offload_activations"], plan["layers"], plan["tile_tokens"], staying)
    wanted = asked.offload_activations
    if isinstance(wanted, bool):
        wanted = len(rungs) if wanted else 0
    return before if wanted in ("auto", before.num_away) else None


def _plan_before(folder: RunFolder, device_name: str) -> dict[str, Any]:
    """The plan.json of the run so far; empty on another device."""
    plan = folder.read_json("plan.json")
    return plan if plan.get("device_name") == device_name else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
