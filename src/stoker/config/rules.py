"""Rules across fields: what each field allows on its own, but not together. One small function each."""

import re
from collections.abc import Collection, Iterator

from stoker.config.document import Path
from stoker.config.messages import Finding
from stoker.config.schema import RunConfig, Source, WarmupStableDecay

Given = Collection[Path]


def findings(config: RunConfig, given: Given) -> list[Finding]:
    """Returns what is wrong between fields; `given` are the paths that were written down."""
    return [finding for rule in RULES for finding in rule(config, given)]


def one_length(config: RunConfig, given: Given) -> Iterator[Finding]:
    """Epochs or steps, not both."""
    if config.train.epochs and config.train.steps:
        yield Finding(("train", "steps"), "train.epochs and train.steps are both set.", "Keep one of them.")


def one_interval(config: RunConfig, given: Given) -> Iterator[Finding]:
    """Intervals in steps or in epochs, not both."""
    for section, verb in (("train", "evaluate"), ("output", "save")):
        steps, epochs = (f"{verb}_every_steps", f"{verb}_every_epochs")
        values = getattr(config, section)
        if getattr(values, steps) and getattr(values, epochs):
            what = f"{section}.{steps} and {section}.{epochs} are both set."
            yield Finding((section, epochs), what, "Keep one of them.")


def one_warmup(config: RunConfig, given: Given) -> Iterator[Finding]:
    """Warm-up in steps or as a ratio, not both, and shorter than the run."""
    schedule, steps = config.train.schedule, config.train.steps
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        what = "train.schedule.warmup_steps and train.schedule.warmup_ratio are both set."
        yield Finding(("train", "schedule", "warmup_ratio"), what, "Keep one of them.")
    elif steps and schedule.warmup_steps and schedule.warmup_steps >= steps:
        what = f"train.schedule.warmup_steps = {schedule.warmup_steps}: the whole run has only {steps} steps."
        yield Finding(("train", "schedule", "warmup_steps"), what, "Warm up for fewer steps, or train for more.")


def decay_after_warmup(config: RunConfig, given: Given) -> Iterator[Finding]:
    """Warm-up and decay must leave room for each other."""
    schedule = config.train.schedule
    if isinstance(schedule, WarmupStableDecay) and (schedule.warmup_ratio or 0.0) + schedule.decay_ratio > 1.0:
        what = f"train.schedule: warmup_ratio {schedule.warmup_ratio} and decay_ratio {schedule.decay_ratio} exceed 1."
        yield Finding(("train", "schedule", "decay_ratio"), what, "Make them add up to 1 at most.")


def micro_batch_divides_batch(config: RunConfig, given: Given) -> Iterator[Finding]:
    """A step is a whole number of micro-batches."""
    batch, micro = config.train.batch_size, config.engine.micro_batch_size
    if micro == "auto" or batch % micro == 0:
        return
    below = next(size for size in range(min(micro, batch), 0, -1) if batch % size == 0)
    above = next((size for size in range(micro, batch) if batch % size == 0), batch)
    sizes = f"{below} or {above}" if above != below else str(below)
    what = f"engine.micro_batch_size = {micro} does not divide train.batch_size = {batch}."
    yield Finding(("engine", "micro_batch_size"), what, f"Use {sizes}, or auto and let the plan choose.")


def evaluation_needs_rows(config: RunConfig, given: Given) -> Iterator[Finding]:
    """What looks at the validation loss needs validation rows."""
    if config.data.validation is not None:
        return
    paths: list[Path] = [("train", "evaluate_every_steps"), ("train", "evaluate_every_epochs")]
    wanted = [path for path in paths if path in given and getattr(config.train, str(path[-1])) is not None]
    wanted += [("train", "early_stopping")] if config.train.early_stopping else []
    wanted += [("output", "keep_best")] if ("output", "keep_best") in given and config.output.keep_best else []
    for path in wanted:
        what = f"{'.'.join(map(str, path))} is set, but there are no validation rows."
        yield Finding(path, what, "Set data.validation, for example 0.05, or remove it.")


def pretraining_learns_everything(config: RunConfig, given: Given) -> Iterator[Finding]:
    """Continued pre-training takes plain text whole: settings of turns would do nothing."""
    if config.task.kind != "pretrain":
        return
    if ("data", "train_on") in given and config.data.train_on != "all":
        yield Finding(
            ("data", "train_on"), "data.train_on: task pretrain learns every token.", "Remove it, or use all."
        )
    for name, why in (("on_long", "cuts long texts into pieces"), ("train_on_end_of_turn", "knows no turns")):
        if ("data", name) in given:
            yield Finding(("data", name), f"data.{name} has no effect: task pretrain {why}.", "Remove it.")
    if config.model.chat_template is not None:
        what = "model.chat_template has no effect: task pretrain reads plain text."
        yield Finding(("model", "chat_template"), what, "Remove it, or use task.kind: sft.")
    for path, source in _sources(config):
        if source.format not in ("auto", "completion"):
            what = f"format {source.format}: task pretrain reads plain text."
            yield Finding((*path, "format"), what, "Use completion, or task.kind: sft.")


def sources_are_files_or_ids(config: RunConfig, given: Given) -> Iterator[Finding]:
    """Only files, folders and Hub ids are read."""
    for path, source in _sources(config):
        if "://" in source.path:
            what = f"{source.path}: this version reads files, folders and Hub ids only."
            yield Finding((*path, "path"), what, "Copy the data to a local file and name that.")


def _sources(config: RunConfig) -> Iterator[tuple[Path, Source]]:
    held_out = config.data.validation
    for index, source in enumerate(config.data.train):
        yield ("data", "train", index), source
    for index, source in enumerate(held_out if isinstance(held_out, list) else ()):
        yield ("data", "validation", index), source


def targets_are_a_pattern(config: RunConfig, given: Given) -> Iterator[Finding]:
    """A single text in adapter.targets is a regular expression."""
    targets = config.adapter.targets if config.adapter else "all-linear"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            what = f"adapter.targets = {targets!r} is not a regular expression: {error}."
            yield Finding(
                ("adapter", "targets"), what, "Use all-linear, a list of layer names, or mend the expression."
            )


def half_precision_needs_a_gpu(config: RunConfig, given: Given) -> Iterator[Finding]:
    """fp16 underflows without loss scaling and is slow on CPUs; there it is refused."""
    if config.engine.device == "cpu" and config.engine.precision == "fp16":
        what = "engine.precision = fp16 needs a GPU, but engine.device is cpu."
        yield Finding(("engine", "precision"), what, "Use fp32 or bf16, or auto and let the plan choose.")


RULES = (
    one_length,
    one_interval,
    one_warmup,
    decay_after_warmup,
    micro_batch_divides_batch,
    evaluation_needs_rows,
    pretraining_learns_everything,
    sources_are_files_or_ids,
    targets_are_a_pattern,
    half_precision_needs_a_gpu,
)
