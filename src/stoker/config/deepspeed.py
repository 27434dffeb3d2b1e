"""Settings of `engine.strategy: deepspeed`: our own fields and a DeepSpeed JSON, made one.

What both say must agree where ours was written down; where it was not, the JSON's number is taken. What the JSON leaves
`auto` comes from the plan.
"""

import difflib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from stoker.config import deepspeed_keys as keys
from stoker.config.messages import Finding
from stoker.config.schema import DeepSpeed, RunConfig
from stoker.errors import ConfigError

Values = Mapping[str, Any]

OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
"""Kinds that treat each number by itself, or with its neighbours: they step flat parts of many weights."""

_PLACE = ("engine", "deepspeed", "config")
_SCHEDULES = {"WarmupLR": ("constant",), "WarmupDecayLR": ("linear",), "WarmupCosineLR": ("cosine",)}
_DEFAULT_STAGE = 2


def read(chosen: DeepSpeed) -> dict[str, Any]:
    """Returns the DeepSpeed configuration that `config` names or holds; empty where there is none.

    Raises:
        ConfigError: the file is not there, or is no JSON object.
    """
    if not isinstance(chosen.config, str):
        return dict(chosen.config or {})
    path = pathlib.Path(chosen.config).expanduser()
    where = f"engine.deepspeed.config = {chosen.config}"
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{where}: {error.strerror or error}.", fix="Name a JSON file, or write its content there."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}.", fix="Mend it.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold an object.", fix="Write {{...}}.")
    return values


def stage(chosen: DeepSpeed) -> int:
    """Returns the stage of ZeRO, which is 2 unless something says otherwise."""
    if chosen.stage != "auto":
        return chosen.stage
    theirs = _said(_zero(read(chosen)), "stage")
    return _DEFAULT_STAGE if theirs is None else int(theirs)


def offload(chosen: DeepSpeed) -> tuple[str, str]:
    """Returns where the optimiser's state and the weights wait: "none", "cpu" or "nvme" each."""
    zero = _zero(read(chosen))
    ours = (chosen.offload_optimizer, chosen.offload_parameters)
    theirs = (_device(zero, "offload_optimizer"), _device(zero, "offload_param"))
    optimizer, parameters = ((mine if mine != "auto" else its) for mine, its in zip(ours, theirs, strict=True))
    return optimizer, parameters


def settings(chosen: DeepSpeed, *, hidden_size: int | None) -> dict[str, Any]:
    """Returns what DeepSpeed is given, without what is the run's own: batch sizes, precision, clipping, optimiser.

    `auto` sizes of buckets are those that Transformers fills in, from the model's `hidden_size`; without one (None),
    and for other `auto`s, DeepSpeed's defaults hold.
    """
    given = read(chosen)
    zero = _without_auto(_zero(given))
    width = hidden_size or 0
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": 9 * width * width // 10,
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero |= {name: size for name, size in sizes.items() if width and _zero(given).get(name) == "auto"}
    zero = {name: value for name, value in zero.items() if f"zero_optimization.{name}" not in keys.REFUSED}
    zero["stage"] = stage(chosen)
    for name, device in zip(("offload_optimizer", "offload_param"), offload(chosen), strict=True):
        part = {key: value for key, value in (zero.pop(name, None) or {}).items() if key not in keys.HARMLESS}
        if device != "none":
            path = {"nvme_path": chosen.nvme_path} if device == "nvme" and chosen.nvme_path else {}
            zero[name] = {**part, "device": device, **path}
    passed = {name: given[name] for name in keys.PASSED if given.get(name, "auto") != "auto"}
    return {**passed, "zero_optimization": zero}


def bucket_values(chosen: DeepSpeed) -> int | None:
    """Returns of how many gradients DeepSpeed sums at once; None: as many as the model's width squared (`auto`)."""
    size = _zero(read(chosen)).get("reduce_bucket_size")
    return None if size == "auto" else int(5e8 if size is None else size)


def applied(config: RunConfig) -> RunConfig:
    """Returns the configuration with what the JSON decides and ours leaves open."""
    engine, train = config.engine, config.train
    if engine.strategy != "deepspeed" or engine.deepspeed.config is None:
        return config
    given = read(engine.deepspeed)
    changes: dict[str, Any] = {}
    if engine.precision == "auto" and (precision := _precision(given)):
        changes["precision"] = precision
    if engine.micro_batch_size == "auto" and (rows := _said(given, "train_micro_batch_size_per_gpu")):
        changes["micro_batch_size"] = int(rows)
    trained: dict[str, Any] = {}
    if "max_gradient_norm" not in train.model_fields_set and (norm := _said(given, "gradient_clipping")) is not None:
        trained["max_gradient_norm"] = float(norm) or None
    return config.model_copy(
        update={
            "engine": engine.model_copy(update=changes),
            "train": train.model_copy(update=trained),
        }
    )


def accumulation_steps(chosen: DeepSpeed) -> int | None:
    """Returns how many micro-batches a step has according to the JSON; None: it does not say."""
    steps = _said(read(chosen), "gradient_accumulation_steps")
    return None if steps is None else int(steps)


def findings(config: RunConfig) -> Iterator[Finding]:
    """Settings of DeepSpeed that it does not know, that contradict ours, or that cannot be."""
    engine = config.engine
    if engine.strategy != "deepspeed":
        # Compared, not asked for what was set: a run's own config.yaml sets everything.
        if engine.deepspeed != type(engine.deepspeed)():
            what = f"engine.deepspeed has no effect: engine.strategy is {engine.strategy}."
            yield Finding(("engine", "deepspeed"), what, "Remove it, or use strategy: deepspeed.")
        return
    try:
        given = read(engine.deepspeed)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding(_PLACE, problem.what, problem.fix or "")
        return
    wrong = list(_unknown(given, keys.TOP, ""))
    yield from wrong
    if not wrong:
        yield from _contradictions(config, given)
        yield from _impossible(config)


def _unknown(given: Values, known: Mapping[str, Any], prefix: str) -> Iterator[Finding]:
    """What DeepSpeed has no such key for, what is refused, and values of another kind."""
    for name, value in given.items():
        path = f"{prefix}{name}"
        if path in keys.REFUSED:
            if not _asks_nothing(name, value):
                why, fix = keys.REFUSED[path]
                yield _finding(f"{path}: {why}.", fix)
        elif name not in known:
            names = [*known, *(key.removeprefix(prefix) for key in keys.REFUSED if key.startswith(prefix))]
            close = difflib.get_close_matches(name, names, 1, 0.6)
            yield _finding(f"{path} is no key of DeepSpeed's.", f"Did you mean {close[0]}?" if close else "Remove it.")
        elif isinstance(known[name], Mapping):
            if isinstance(value, Mapping):
                yield from _unknown(value, known[name], f"{path}.")
            elif value is not None and value != "auto":
                yield _finding(f"{path} = {value} must be a section.", "Write {...}.")
        elif (must := _wrong(value, known[name])) is not None:
            yield _finding(f"{path} = {value}: {must}.", "Mend it, or write auto.")


def _asks_nothing(name: str, value: Any) -> bool:
    enabled = value.get("enabled") if isinstance(value, Mapping) else None
    return value is None or enabled is False or (name in keys.HARMLESS and value == keys.HARMLESS[name])


def _wrong(value: Any, kind: str) -> str | None:
    if value is None or value == "auto" or kind == "any":
        return None
    if kind == "flag":
        return None if isinstance(value, bool) else "it must be true or false"
    if kind == "number":
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        return None if is_number else "it must be a number"
    if kind == "device":
        return None if value in ("none", "cpu", "nvme") else "it must be none, cpu or nvme"
    return None if isinstance(value, str) else "it must be text"


def _contradictions(config: RunConfig, given: Values) -> Iterator[Finding]:
    engine, train, zero = config.engine, config.train, _zero(given)
    ours = engine.deepspeed
    norm = train.max_gradient_norm if "max_gradient_norm" in train.model_fields_set else "auto"
    rows = train.batch_size if "batch_size" in train.model_fields_set else "auto"
    pairs: tuple[tuple[str, Any, str, Any], ...] = (
        ("engine.deepspeed.stage", ours.stage, "zero_optimization.stage", _said(zero, "stage")),
        *(
            (f"engine.deepspeed.{mine}", getattr(ours, mine), f"zero_optimization.{its}.device", _device(zero, its))
            for mine, its in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param"))
            if _said(zero, its) is not None
        ),
        ("train.batch_size", rows, "train_batch_size", _said(given, "train_batch_size")),
        (
            "engine.micro_batch_size",
            engine.micro_batch_size,
            "train_micro_batch_size_per_gpu",
            _said(given, "train_micro_batch_size_per_gpu"),
        ),
        ("train.max_gradient_norm", norm or 0.0, "gradient_clipping", _said(given, "gradient_clipping")),
        ("engine.precision", engine.precision, "bf16 and fp16", _precision(given)),
    )
    for name, mine, path, its in pairs:
        if its not in (None, mine) and mine != "auto":
            yield _finding(f"{path} says {its}, but {name} = {mine}.", f"Write auto there, or {name}: {its}.")
    yield from _optimizer(config, given)
    yield from _scheduler(config, given)
    if given.get("zero_force_ds_cpu_optimizer") is True:
        yield _finding("zero_force_ds_cpu_optimizer = true: train.optimizer is what steps.", "Remove it.")


def _optimizer(config: RunConfig, given: Values) -> Iterator[Finding]:
    """The optimiser that steps is ours: the JSON may name it with the same numbers, or `auto`."""
    theirs, ours = given.get("optimizer"), config.train.optimizer
    if not isinstance(theirs, Mapping):
        return
    kind = str(theirs.get("type", "AdamW"))
    if kind.lower() not in (ours.kind, ours.kind.removesuffix("w")):
        fix = "Remove the section optimizer; train.optimizer is what steps."
        yield _finding(f"optimizer.type says {kind}, but train.optimizer.kind = {ours.kind}.", fix)
        return
    names = {"lr": "learning_rate", "eps": "epsilon", "betas": "betas", "weight_decay": "weight_decay"}
    for name, its in dict(theirs.get("params") or {}).items():
        mine = config.train.learning_rate if name == "lr" else getattr(ours, names.get(name, name), None)
        if its not in ("auto", mine) and name in names:
            place = "train.learning_rate" if name == "lr" else f"train.optimizer.{names[name]}"
            yield _finding(f"optimizer.params.{name} says {its}, but {place} = {mine}.", "Write auto there.")


def _scheduler(config: RunConfig, given: Values) -> Iterator[Finding]:
    """The schedule that sets the rate is ours: the JSON may name its kind, with `auto` numbers."""
    theirs, ours = given.get("scheduler"), config.train.schedule
    if not isinstance(theirs, Mapping):
        return
    fix = "Remove the section scheduler; train.schedule is what sets the rate."
    kind = str(theirs.get("type", ""))
    if ours.kind not in _SCHEDULES.get(kind, ()):
        yield _finding(f"scheduler.type says {kind}, but train.schedule.kind = {ours.kind}.", fix)
    for name, value in dict(theirs.get("params") or {}).items():
        if value != "auto":
            yield _finding(f"scheduler.params.{name} = {value}: it is set in train.schedule.", fix)


def _impossible(config: RunConfig) -> Iterator[Finding]:
    engine, train = config.engine, config.train
    level, (optimizer, parameters) = stage(engine.deepspeed), offload(engine.deepspeed)
    if level not in (1, 2, 3):
        yield _finding(f"stage {level} of ZeRO shares nothing.", "Use stage 1, 2 or 3, or engine.strategy: ddp.")
    if parameters != "none" and level != 3:
        what = f"weights are offloaded in stage 3, and the stage is {level}."
        yield Finding(("engine", "deepspeed", "offload_parameters"), what, "Use stage: 3, or none.")
    if optimizer == "nvme" and level != 3:
        what = f"the optimiser's state goes to NVMe in stage 3, and the stage is {level}."
        yield Finding(("engine", "deepspeed", "offload_optimizer"), what, "Use stage: 3, or cpu.")
    if parameters == "nvme" and config.adapter is not None:
        what = "weights on NVMe have one number format, and an adapter's are fp32 beside a base in another."
        yield Finding(("engine", "deepspeed", "offload_parameters"), what, "Use cpu.")
    for name, device in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        path = engine.deepspeed.nvme_path or (_zero(read(engine.deepspeed)).get(name) or {}).get("nvme_path")
        if device == "nvme" and not path:
            what = f"{name} is nvme, and nothing says where."
            yield Finding(("engine", "deepspeed", "nvme_path"), what, "Set it to a folder on an NVMe disk.")
    if "fp16" in (engine.precision, _precision(read(engine.deepspeed))):
        what = "engine.precision = fp16: engine.strategy = deepspeed has no loss scale here."
        yield Finding(("engine", "precision"), what, "Use bf16 or fp32, or strategy: ddp.")
    if train.weight_dtype == "bf16":
        what = "train.weight_dtype = bf16: DeepSpeed's optimiser keeps its weights in fp32."
        yield Finding(("train", "weight_dtype"), what, "Use fp32, or strategy: fsdp2.")
    if train.optimizer.kind not in OPTIMIZERS:
        what = f"train.optimizer.kind = {train.optimizer.kind}: DeepSpeed steps flat parts of many weights at once."
        fix = (
            f"Use {', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}, which need no rows or columns, or strategy: fsdp2."
        )
        yield Finding(("train", "optimizer", "kind"), what, fix)
    if train.optimizer.kind == "adamw_8bit" and optimizer == "nvme":
        what = "train.optimizer.kind = adamw_8bit: DeepSpeed writes no state to NVMe but fp32."
        yield Finding(("engine", "deepspeed", "offload_optimizer"), what, "Use cpu, or optimizer: {kind: adamw}.")
    if engine.context_parallel > 1:
        what = f"engine.context_parallel = {engine.context_parallel}: rows are shared under ddp and fsdp2."
        yield Finding(("engine", "context_parallel"), what, "Use strategy: fsdp2, or leave it out.")
    if engine.device == "mps":
        yield Finding(("engine", "device"), "engine.device = mps: DeepSpeed is for CUDA GPUs here.", "Use single.")


def _finding(what: str, fix: str) -> Finding:
    return Finding(_PLACE, f"engine.deepspeed.config: {what}", fix)


def _zero(given: Values) -> dict[str, Any]:
    zero = given.get("zero_optimization")
    return dict(zero) if isinstance(zero, Mapping) else {}


def _said(values: Values, name: str) -> Any:
    """The value under a name, or None where there is none or it is left to us."""
    value = values.get(name)
    return None if value == "auto" else value


def _device(zero: Values, name: str) -> str:
    part = zero.get(name)
    return str(part.get("device") or "none") if isinstance(part, Mapping) else "none"


def _precision(given: Values) -> str | None:
    """The number format that is turned on, or None."""
    for name in ("bf16", "fp16"):
        part = given.get(name)
        if isinstance(part, Mapping) and part.get("enabled") is True:
            return name
    return None


def _without_auto(values: Values) -> dict[str, Any]:
    plain = {name: _without_auto(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value != "auto" and value is not None}
