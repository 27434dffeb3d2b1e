"""How long, in which batches and at which rate: the keys that only mean something together."""

from collections.abc import Mapping
from typing import Any

from stoker.config.axolotl import parallel
from stoker.config.axolotl.entries import at, honoured
from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import advice, is_off, number, positive, whole

Whole = Mapping[str, Any]

_DEFAULT_WARMUP, _MOST_DEFAULT_WARMUP_STEPS = 0.03, 100


def epochs(keys: Whole) -> float:
    """Returns the epochs of the file: 1 unless set."""
    return number(keys.get("num_epochs", 1.0))


def max_steps(keys: Whole) -> int | None:
    """Returns the steps that end the run, or None where epochs do; -1 and 0 are none."""
    value = keys.get("max_steps")
    return whole(value) if value is not None and whole(value) > 0 else None


def length(reading: Reading) -> Outcome:
    """`num_epochs` and `max_steps`: steps win where both are set."""
    steps = max_steps(reading.whole)
    if reading.name == "max_steps":
        if steps is None:
            return Outcome("no effect", "num_epochs decides")
        return honoured({at("train.steps"): steps})
    if steps is not None:
        return Outcome("no effect", f"max_steps: {steps} decides")
    return honoured({at("train.epochs"): number(reading.value)})


# Batches


def micro_batch(keys: Whole) -> int:
    """Returns the rows that go through the model at once: given, or batch_size / accumulation, or 1."""
    if keys.get("micro_batch_size") is not None:
        return positive(keys["micro_batch_size"])
    if keys.get("batch_size") is not None and keys.get("gradient_accumulation_steps") is not None:
        return max(1, positive(keys["batch_size"]) // positive(keys["gradient_accumulation_steps"]))
    return 1


def step_rows(keys: Whole) -> int:
    """Returns the rows of an optimiser step over all devices.

    On each device that is micro_batch_size x gradient_accumulation_steps, or batch_size; devices that hold different
    rows multiply it.
    """
    micro = micro_batch(keys)
    accumulated = keys.get("gradient_accumulation_steps")
    if keys.get("batch_size") is not None:
        asked = positive(keys["batch_size"])
        if accumulated is not None and micro * positive(accumulated) != asked:
            rows = micro * positive(accumulated)
            what = f"micro_batch_size x gradient_accumulation_steps is {rows}, but batch_size is {asked}."
            raise UnreadableError(what, "Keep two of the three.")
        rows = asked // micro * micro
        if rows != asked:
            raise UnreadableError(f"batch_size {asked} is not a multiple of micro_batch_size {micro}.", "Make it one.")
    else:
        rows = micro * (positive(accumulated) if accumulated is not None else 1)
    return rows * parallel.data_ranks(keys)


def batch(reading: Reading) -> Outcome:
    """`micro_batch_size`, `gradient_accumulation_steps` and `batch_size` make the same two fields of ours."""
    positive(reading.value)
    rows = step_rows(reading.whole)
    if reading.name == "micro_batch_size":
        return honoured({at("engine.micro_batch_size"): micro_batch(reading.whole), at("train.batch_size"): rows})
    return honoured({at("train.batch_size"): rows}, "rows of an optimiser step over all devices")


# Warm-up and schedule

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "linear": "linear",
    "polynomial": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse_sqrt",
    "warmup_stable_decay": "wsd",
}
"""Transformers' names of schedules -> our kinds."""
NO_SCHEDULES = {
    "reduce_lr_on_plateau": "linear or cosine",
    "greedy": "linear or cosine",
    "one_cycle": "cosine",
    "rex": "cosine",
}
"""Schedules that are not done -> the nearest that is."""
# The floor of Transformers' polynomial decay, whose power is 1 unless lr_scheduler_kwargs say otherwise.
_POLYNOMIAL_END = 1e-7


def scheduler(keys: Whole) -> str:
    """Returns Axolotl's name of the schedule: cosine unless set."""
    return str(keys.get("lr_scheduler", "cosine"))


def schedule(reading: Reading) -> Outcome:
    """`lr_scheduler`: its shape; warm-up and floor have their own keys."""
    name = str(reading.value)
    if name in NO_SCHEDULES:
        return Outcome("refused", f"the schedule {name} is not done. Use {NO_SCHEDULES[name]}.")
    if name not in SCHEDULES:
        known = [*SCHEDULES, *NO_SCHEDULES]
        raise UnreadableError("it is not one of the words that Axolotl knows.", advice(name, known))
    settings: dict[tuple[str | int, ...], Any] = {at("train.schedule.kind"): SCHEDULES[name]}
    note = ""
    if name == "polynomial":
        settings[at("train.schedule.floor")] = min(1.0, _POLYNOMIAL_END / number(reading.other("learning_rate") or 1.0))
        note = "power 1: a straight line"
    return honoured(settings, note)


def takes_warmup(keys: Whole) -> bool:
    """Whether the schedule has a warm-up; Transformers' `constant` has none."""
    return scheduler(keys) != "constant"


def _warmup_steps(steps: int, keys: Whole) -> Outcome:
    total = max_steps(keys)
    if total is not None and steps >= total:
        note = f"the run has only {total} steps; Axolotl would never leave the warm-up"
        return honoured({at("train.schedule.warmup_steps"): total - 1}, note)
    return honoured({at("train.schedule.warmup_steps"): steps})


def warmup(reading: Reading) -> Outcome:
    """`warmup_steps` and `warmup_ratio`; a fraction given as steps is a ratio."""
    steps, ratio = reading.other("warmup_steps"), reading.other("warmup_ratio")
    if number(steps or 0) and number(ratio or 0):
        raise UnreadableError("warmup_steps and warmup_ratio are both set.", "Keep one of them.")
    if not takes_warmup(reading.whole):
        return Outcome("no effect", "lr_scheduler: constant has no warm-up; constant_with_warmup has")
    value = number(reading.value)
    if value < 0:
        raise UnreadableError("it must be at least 0.")
    if reading.name == "warmup_ratio" or 0 < value < 1:
        if value >= 1:
            raise UnreadableError("it must be below 1.")
        note = "a fraction of steps is a ratio" if reading.name == "warmup_steps" else ""
        return honoured({at("train.schedule.warmup_ratio"): value}, note)
    if value == 0 and ratio is not None:
        return Outcome("no effect", "warmup_ratio decides")
    return _warmup_steps(whole(value), reading.whole)


def default_warmup(keys: Whole) -> tuple[tuple[str, ...], Any] | None:
    """Returns the warm-up of a file that sets none: 3% of the steps, 100 at most where the number of steps is known."""
    if not takes_warmup(keys) or keys.get("warmup_steps") is not None or keys.get("warmup_ratio") is not None:
        return None
    steps = max_steps(keys) or 0
    most = _MOST_DEFAULT_WARMUP_STEPS / steps if steps else 1.0
    return ("train", "schedule", "warmup_ratio"), min(_DEFAULT_WARMUP, most)


def cosine_floor(reading: Reading) -> Outcome:
    """`cosine_min_lr_ratio`: read for lr_scheduler: cosine alone."""
    if scheduler(reading.whole) != "cosine":
        return Outcome("no effect", "only lr_scheduler: cosine reads it")
    ratio = number(reading.value)
    if not 0 <= ratio <= 1:
        raise UnreadableError("it must be from 0 to 1.")
    return honoured({at("train.schedule.floor"): ratio})


def cosine_constant(reading: Reading) -> Outcome:
    """`cosine_constant_lr_ratio`: reaches the floor before the end; 0, or no floor, leaves it unread."""
    floor = reading.other("cosine_min_lr_ratio")
    if is_off(reading.value) or not floor or scheduler(reading.whole) != "cosine":
        return Outcome("no effect", "Axolotl reads it only above 0, beside cosine_min_lr_ratio")
    if number(reading.value) == 1:
        return Outcome("no effect", "1: the floor is reached at the end, as it is here")
    if number(floor) == 1:
        return Outcome("no effect", "the rate is constant: cosine_min_lr_ratio is 1")
    nearest = "Leave it out: the floor is then reached at the end of the run."
    return Outcome("refused", f"a rate that stays at its floor before the end is not done. {nearest}")


def scheduler_arguments(reading: Reading) -> Outcome:
    """`lr_scheduler_kwargs`: those of Transformers that our schedules have."""
    if not isinstance(reading.value, Mapping):
        raise UnreadableError("it must be a mapping.")
    name, settings = scheduler(reading.whole), {}
    for key, value in reading.value.items():
        settings |= _argument(name, str(key), value, reading.whole)
    return honoured(settings) if settings else Outcome("no effect", f"as lr_scheduler: {name} is by itself")


def _argument(name: str, key: str, value: Any, keys: Whole) -> dict[tuple[str | int, ...], Any]:
    floor = at("train.schedule.floor")
    rate = number(keys.get("learning_rate") or 1.0)
    is_same = {"num_cycles": 0.5 if name.startswith("cosine") and "restarts" not in name else 1, "power": 1.0}
    if key in ("min_lr_rate", "min_lr_ratio"):
        return {floor: number(value)}
    if key in ("min_lr", "eta_min", "lr_end"):
        return {floor: min(1.0, number(value) / rate)}
    if key in is_same and number(value) == is_same[key]:
        return {}
    if key == "num_decay_steps" and max_steps(keys) is not None:
        return {at("train.schedule.decay_ratio"): min(0.999, whole(value) / (max_steps(keys) or 1))}
    if key == "decay_type" and value == "linear":
        return {}
    what = f"{key}: {value} of lr_scheduler {name} is not done."
    raise UnreadableError(what, "Leave it out. min_lr, min_lr_rate and, with max_steps, num_decay_steps are done.")


# Evaluation and checkpoints


def has_validation(keys: Whole) -> bool:
    """Whether rows are held out to evaluate on."""
    return bool(keys.get("test_datasets")) or number(keys.get("val_set_size") or 0) > 0


def _interval(verb: str, section: str, reading: Reading, share: float) -> Outcome:
    """Returns the interval that is a share of the whole run."""
    steps = max_steps(reading.whole)
    if steps is not None:
        return honoured({at(f"{section}.{verb}_every_steps"): max(1, -int(-share * steps // 1))})
    return honoured({at(f"{section}.{verb}_every_epochs"): share * epochs(reading.whole)})


def _every(verb: str, section: str, reading: Reading) -> Outcome:
    """Returns the interval of `eval_steps` or `save_steps`: a count, or below 1 a share of the run."""
    value = number(reading.value)
    if value <= 0:
        raise UnreadableError("it must be above 0.")
    if value < 1:
        return _interval(verb, section, reading, value)
    return honoured({at(f"{section}.{verb}_every_steps"): whole(value)})


_NO_ROWS = "no rows are held out: val_set_size is 0 and there are no test_datasets"


def once(section: str, verb: str, keys: Whole) -> tuple[tuple[str, ...], Any]:
    """Returns the interval that falls on the end of the run alone, as a path and its value."""
    steps = max_steps(keys)
    if steps is not None:
        return (section, f"{verb}_every_steps"), steps
    return (section, f"{verb}_every_epochs"), epochs(keys)


def _at_the_end(reading: Reading, verb: str, section: str) -> Outcome:
    path, value = once(section, verb, reading.whole)
    return honoured({path: value}, "at the end of the run, where it is always done")


def evaluation(reading: Reading) -> Outcome:
    """`evals_per_epoch`, `eval_steps`, `eval_strategy` and its old name."""
    keys = reading.whole
    if not has_validation(keys):
        return Outcome("no effect", _NO_ROWS)
    name, value = reading.name, reading.value
    if name == "eval_steps":
        if not is_off(keys.get("evals_per_epoch") or 0):
            raise UnreadableError("eval_steps and evals_per_epoch are both set.", "Keep one of them.")
        return _at_the_end(reading, "evaluate", "train") if is_off(value) else _every("evaluate", "train", reading)
    if name == "evals_per_epoch":
        if is_off(value):
            decides = keys.get("eval_steps") or keys.get("eval_strategy") or keys.get("evaluation_strategy")
            return Outcome("no effect", "0") if decides else _at_the_end(reading, "evaluate", "train")
        return honoured({at("train.evaluate_every_epochs"): 1 / number(value)})
    return _strategy(reading, "evaluate", "train", decided=("eval_steps", "evals_per_epoch"))


def saving(reading: Reading) -> Outcome:
    """`saves_per_epoch`, `save_steps` and `save_strategy`."""
    keys, name, value = reading.whole, reading.name, reading.value
    if name == "save_steps":
        if not is_off(keys.get("saves_per_epoch") or 0):
            raise UnreadableError("save_steps and saves_per_epoch are both set.", "Keep one of them.")
        return _at_the_end(reading, "save", "output") if is_off(value) else _every("save", "output", reading)
    if name == "saves_per_epoch":
        if is_off(value):
            return _at_the_end(reading, "save", "output")
        return honoured({at("output.save_every_epochs"): 1 / number(value)})
    if value == "best":
        return honoured({at("output.keep_best"): True}, "the best is saved when it is found, beside the usual ones")
    return _strategy(reading, "save", "output", decided=("save_steps", "saves_per_epoch"))


def _strategy(reading: Reading, verb: str, section: str, *, decided: tuple[str, str]) -> Outcome:
    value = str(reading.value).lower()
    given = next((name for name in decided if not is_off(reading.other(name) or 0)), None)
    if value == "steps":
        if given:
            return Outcome("honoured", f"as {given} says")
        # Transformers' own interval where a strategy of steps names none.
        return honoured({at(f"{section}.{verb}_every_steps"): 500}, "500 is Transformers' default")
    if value not in ("epoch", "no", "false"):
        raise UnreadableError("it must be no, steps or epoch.")
    if given:
        raise UnreadableError(f"{given} is set too.", "Keep one of them.")
    if value == "epoch":
        return honoured({at(f"{section}.{verb}_every_epochs"): 1.0})
    return _at_the_end(reading, verb, section)


def early_stopping(reading: Reading) -> Outcome:
    """`early_stopping_patience`: needs rows to evaluate on."""
    if is_off(reading.value):
        return Outcome("no effect", "off, as it is here")
    if not has_validation(reading.whole):
        raise UnreadableError(f"{_NO_ROWS}.", "Hold rows out with val_set_size.")
    return honoured({at("train.early_stopping.patience"): positive(reading.value)})


def watchdog_patience(reading: Reading) -> Outcome:
    """`loss_watchdog_patience`: says nothing without a threshold."""
    if reading.other("loss_watchdog_threshold") is None:
        return Outcome("no effect", "only read with loss_watchdog_threshold, which is not set")
    return honoured({at("train.loss_limit.patience"): positive(reading.value)})
