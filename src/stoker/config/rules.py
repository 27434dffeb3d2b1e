"""Rules across fields: what each field allows on its own, but not together. One small function each."""

import re
from collections.abc import Iterator
from pathlib import Path as FilePath

from stoker.config import deepspeed, row_formats
from stoker.config.document import Path, dotted
from stoker.config.messages import Finding
from stoker.config.schema import RunConfig, Source, WarmupStableDecay


def findings(config: RunConfig) -> list[Finding]:
    """Returns what is wrong between fields."""
    return [finding for rule in RULES for finding in rule(config)]


def one_length(config: RunConfig) -> Iterator[Finding]:
    """Epochs or steps, not both."""
    if config.train.epochs and config.train.steps:
        yield Finding(("train", "steps"), "train.epochs and train.steps are both set.", "Keep one of them.")


def one_interval(config: RunConfig) -> Iterator[Finding]:
    """Intervals in steps or in epochs, not both."""
    for section, verb in (("train", "evaluate"), ("output", "save")):
        steps, epochs = (f"{verb}_every_steps", f"{verb}_every_epochs")
        values = getattr(config, section)
        if getattr(values, steps) and getattr(values, epochs):
            what = f"{section}.{steps} and {section}.{epochs} are both set."
            yield Finding((section, epochs), what, "Keep one of them.")


def one_warmup(config: RunConfig) -> Iterator[Finding]:
    """Warm-up in steps or as a ratio, not both, and shorter than the run."""
    schedule, steps = config.train.schedule, config.train.steps
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        what = "train.schedule.warmup_steps and train.schedule.warmup_ratio are both set."
        yield Finding(("train", "schedule", "warmup_ratio"), what, "Keep one of them.")
    elif steps and schedule.warmup_steps and schedule.warmup_steps >= steps:
        what = f"train.schedule.warmup_steps = {schedule.warmup_steps}: the whole run has only {steps} steps."
        yield Finding(("train", "schedule", "warmup_steps"), what, "Warm up for fewer steps, or train for more.")


def decay_after_warmup(config: RunConfig) -> Iterator[Finding]:
    """Warm-up and decay must leave room for each other."""
    schedule = config.train.schedule
    if isinstance(schedule, WarmupStableDecay) and (schedule.warmup_ratio or 0.0) + schedule.decay_ratio > 1.0:
        what = f"train.schedule: warmup_ratio {schedule.warmup_ratio} and decay_ratio {schedule.decay_ratio} exceed 1."
        yield Finding(("train", "schedule", "decay_ratio"), what, "Make them add up to 1 at most.")


def micro_batch_divides_batch(config: RunConfig) -> Iterator[Finding]:
    """A step is a whole number of micro-batches."""
    batch, micro = config.train.batch_size, config.engine.micro_batch_size
    if micro == "auto" or batch % micro == 0:
        return
    below = next(size for size in range(min(micro, batch), 0, -1) if batch % size == 0)
    above = next((size for size in range(micro, batch) if batch % size == 0), batch)
    sizes = f"{below} or {above}" if above != below else str(below)
    what = f"engine.micro_batch_size = {micro} does not divide train.batch_size = {batch}."
    yield Finding(("engine", "micro_batch_size"), what, f"Use {sizes}, or auto and let the plan choose.")


def evaluation_needs_rows(config: RunConfig) -> Iterator[Finding]:
    """What looks at the validation loss needs validation rows."""
    if config.data.validation is not None:
        return
    for name in ("evaluate_every_steps", "evaluate_every_epochs", "early_stopping"):
        if getattr(config.train, name) is not None:
            what = f"train.{name} is set, but there are no validation rows."
            yield Finding(("train", name), what, "Set data.validation, for example 0.05, or remove it.")


def pretraining_learns_everything(config: RunConfig) -> Iterator[Finding]:
    """Continued pre-training takes plain text whole: settings of turns would do nothing."""
    if config.task.kind != "pretrain":
        return
    refused = {
        ("data", "train_on"): (config.data.train_on != "all", "learns every token"),
        ("data", "on_long"): (config.data.on_long != "split", "cuts long texts into pieces"),
        ("data", "train_on_end_of_turn"): (config.data.train_on_end_of_turn not in ("turn", True), "knows no turns"),
        ("model", "chat_template"): (config.model.chat_template is not None, "reads plain text"),
    }
    for path, (is_set, why) in refused.items():
        if is_set:
            yield Finding(
                path, f"{dotted(path)} has no effect: task pretrain {why}.", "Remove it, or use task.kind: sft."
            )
    for path, source in _sources(config):
        if source.format not in ("auto", "completion", "pretrain"):
            what = f"{dotted(path)}.format = {source.format}: task pretrain reads plain text."
            yield Finding((*path, "format"), what, "Use completion, or task.kind: sft.")


def formats_are_known(config: RunConfig) -> Iterator[Finding]:
    """A format is one of ours or another's name for one; a prompt needs its text, and training needs a task for it."""
    for path, source in _sources(config):
        wrong = row_formats.problem(source.format)
        if wrong:
            yield Finding((*path, "format"), f"{dotted(path)}.{wrong[0]}", wrong[1])
        elif row_formats.expanded(source).format == "prompt" and not row_formats.expanded(source).prompt.format:
            what = f"{dotted(path)}.format = prompt: the prompt's text is missing."
            fix = 'Write it: prompt: {format: "User: {instruction}\\nAssistant: "}.'
            yield Finding((*path, "prompt"), what, fix)


def conversations_stay_whole(config: RunConfig) -> Iterator[Finding]:
    """A piece of a conversation would start in the middle of a turn."""
    if config.task.kind == "sft" and config.data.on_long == "split":
        what = "data.on_long = split is for task pretrain; a conversation is not cut into pieces."
        yield Finding(("data", "on_long"), what, "Use truncate, drop or stop.")


def weights_for_all_or_none(config: RunConfig) -> Iterator[Finding]:
    """A share means nothing beside sources without one."""
    weights = [source.weight for source in config.data.train]
    if any(weights) and None in weights:
        index = weights.index(None)
        what = f"data.train[{index}] has no weight, and other sources have one."
        yield Finding(("data", "train", index), what, "Give every source a weight, or none.")


def weights_mix_training_rows(config: RunConfig) -> Iterator[Finding]:
    """Only training rows are drawn by weight, and to draw from several sources each of them must be there."""
    data = config.data
    weights = [source.weight for source in data.train]
    if data.prepare == "overlap" and not data.streaming and len(weights) > 1 and None not in weights:
        what = "data.train[0].weight: data.prepare = overlap goes through the sources one after the other."
        fix = "Use data.prepare: ahead or data.streaming: true, which mix sources, or remove the weights."
        yield Finding(("data", "train", 0, "weight"), what, fix)
    for index, source in enumerate(data.validation if isinstance(data.validation, list) else ()):
        if source.weight is not None:
            what = f"data.validation[{index}].weight has no effect: every held-out row is evaluated once."
            yield Finding(("data", "validation", index, "weight"), what, "Remove it.")


def some_length_is_left(config: RunConfig) -> Iterator[Finding]:
    """Between the least and the greatest length there must be room for a document."""
    data = config.data
    if data.on_long in ("drop", "stop") and data.min_length > data.sequence_length:
        what = (
            f"data.min_length = {data.min_length} and data.sequence_length = {data.sequence_length} with "
            f"data.on_long = {data.on_long} leave no document."
        )
        yield Finding(("data", "min_length"), what, "Lower it.")


def shards_exist(config: RunConfig) -> Iterator[Finding]:
    """Parts are counted from 0."""
    for path, source in _sources(config):
        shard = source.shard
        if shard is not None and shard.index >= shard.num:
            what = f"{dotted(path)}.shard.index = {shard.index}, but the parts are 0 to {shard.num - 1}."
            yield Finding((*path, "shard", "index"), what, "Count from 0.")


def windows_need_steps(config: RunConfig) -> Iterator[Finding]:
    """While rows are still to be read nobody knows how many steps an epoch has, nor which rows could be held out."""
    data = config.data
    name = "data.streaming = true" if data.streaming else "data.prepare = overlap"
    if not data.streaming and data.prepare != "overlap":
        return
    if config.train.steps is None:
        what = f"{name} needs train.steps: how many steps an epoch has is not known before all rows are read."
        yield Finding(("train", "steps"), what, "Set train.steps instead of train.epochs.")
    if isinstance(data.validation, int | float):
        what = f"data.validation = {data.validation}: with {name} no rows can be drawn from the data beforehand."
        yield Finding(("data", "validation"), what, "Name a source of their own: validation: [{path: held-out.jsonl}].")
    if data.streaming and data.deduplicate:
        what = "data.deduplicate remembers every row, and data.streaming keeps none."
        yield Finding(("data", "deduplicate"), what, "Set one of them, or use data.prepare: overlap.")
    if data.streaming and data.prepare == "overlap":
        what = "data.streaming = true prepares nothing, so data.prepare = overlap has no meaning."
        yield Finding(("data", "prepare"), what, "Keep one: overlap keeps prepared rows on disk, streaming does not.")


def _sources(config: RunConfig) -> Iterator[tuple[Path, Source]]:
    held_out = config.data.validation
    for index, source in enumerate(config.data.train):
        yield ("data", "train", index), source
    for index, source in enumerate(held_out if isinstance(held_out, list) else ()):
        yield ("data", "validation", index), source


def targets_are_a_pattern(config: RunConfig) -> Iterator[Finding]:
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


def half_precision_needs_a_gpu(config: RunConfig) -> Iterator[Finding]:
    """fp16 underflows without loss scaling and is slow on CPUs; there it is refused."""
    if config.engine.device == "cpu" and config.engine.precision == "fp16":
        what = "engine.precision = fp16 needs a GPU, but engine.device is cpu."
        yield Finding(("engine", "precision"), what, "Use fp32 or bf16, or auto and let the plan choose.")


def only_a_frozen_base_is_quantized(config: RunConfig) -> Iterator[Finding]:
    """Weights that are trained are kept in fp32 or bf16."""
    kind = config.model.quantization
    if kind != "none" and config.adapter is None:
        what = f"model.quantization = {kind} freezes the base, but without an adapter its weights are what is trained."
        yield Finding(("model", "quantization"), what, "Add an adapter (adapter: {kind: lora}), or use none.")


def bf16_weights_are_trained_whole(config: RunConfig) -> Iterator[Finding]:
    """Weights in bf16 need products in bf16 and an optimiser that rounds stochastically; adapters are small: fp32."""
    if config.train.weight_dtype != "bf16":
        return
    if config.adapter is not None:
        what = "train.weight_dtype = bf16 is about the model's own weights, which an adapter leaves frozen."
        yield Finding(("train", "weight_dtype"), what, "Remove it (an adapter's weights stay fp32), or the adapter.")
    kind, precision = config.train.optimizer.kind, config.engine.precision
    if kind != "adamw":
        what = f"train.weight_dtype = bf16 needs an optimiser that rounds stochastically, and {kind} does not."
        yield Finding(("train", "optimizer", "kind"), what, "Use adamw, or weight_dtype: fp32.")
    if precision in ("fp32", "fp16"):
        what = f"engine.precision = {precision}, but with train.weight_dtype = bf16 weights are bf16."
        yield Finding(("engine", "precision"), what, "Use bf16 or auto, or weight_dtype: fp32.")


def fsdp2_settings_fit(config: RunConfig) -> Iterator[Finding]:
    """Settings of a strategy do something, and processes form equal groups."""
    engine, shared = config.engine, config.engine.fsdp2
    # Compared, not asked for what was set: a run's own config.yaml sets everything.
    if engine.strategy not in ("fsdp2", "auto") and shared != type(shared)():
        what = f"engine.fsdp2 has no effect: engine.strategy is {engine.strategy}."
        yield Finding(("engine", "fsdp2"), what, "Remove it, or use strategy: fsdp2.")
    if engine.num_processes and engine.num_processes % shared.replicas:
        what = f"engine.fsdp2.replicas = {shared.replicas} does not divide engine.num_processes"
        yield Finding(
            ("engine", "fsdp2", "replicas"), f"{what} = {engine.num_processes}.", "Use as many groups as machines."
        )
    if shared.offload == "cpu" and engine.precision == "fp16":
        what = "engine.precision = fp16 scales the loss on the GPU, and engine.fsdp2.offload = cpu steps on the host."
        yield Finding(("engine", "precision"), what, "Use bf16, or offload: none.")
    if shared.param_dtype != "auto" and config.adapter is not None:
        what = "engine.fsdp2.param_dtype is about weights that are trained, which an adapter leaves frozen."
        yield Finding(("engine", "fsdp2", "param_dtype"), what, "Remove it: an adapter's weights are small, and fp32.")


def remote_code_is_pinned(config: RunConfig) -> Iterator[Finding]:
    """Code from the Hub may change under a branch or a tag; a folder on this disk changes only by its owner's hand."""
    model = config.model
    is_local = FilePath(model.base).expanduser().is_dir() or model.base.startswith("builtin:")
    if model.trust_remote_code and not is_local and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        what = (
            f"model.trust_remote_code = true with model.revision = {model.revision or 'null'}: what that names can be "
            "changed by others at any time, and with it the code that would run here."
        )
        yield Finding(("model", "revision"), what, "Set it to the commit (40 hexadecimal digits) whose code you read.")


def offloading_needs_a_gpu(config: RunConfig) -> Iterator[Finding]:
    """Activations leave a GPU's memory for the host's; elsewhere there is no other memory to go to."""
    asked = config.engine.offload_activations
    if asked not in ("auto", False) and config.engine.device in ("cpu", "mps"):
        shown = str(asked).lower()
        what = f"engine.offload_activations = {shown} needs a CUDA GPU, but engine.device is {config.engine.device}."
        yield Finding(("engine", "offload_activations"), what, "Use false, or auto and let the plan choose.")


def adapters_have_their_own_settings(config: RunConfig) -> Iterator[Finding]:
    """What is said of an adapter needs one, and under one no weight of the model trains."""
    train, has_adapter = config.train, config.adapter is not None
    if train.lora_plus_ratio is not None and not has_adapter:
        what = "train.lora_plus_ratio is about an adapter's matrices, but there is no adapter."
        yield Finding(("train", "lora_plus_ratio"), what, "Add an adapter (adapter: {kind: lora}), or remove it.")
    for name in ("only", "embedding_learning_rate"):
        if getattr(train, name) is not None and has_adapter:
            what = f"train.{name} is about the model's own weights, which an adapter leaves frozen."
            yield Finding(("train", name), what, "Remove it, or the section adapter.")


def names_are_patterns(config: RunConfig) -> Iterator[Finding]:
    """Entries of train.only are regular expressions."""
    for index, pattern in enumerate(config.train.only or ()):
        try:
            re.compile(pattern)
        except re.error as error:
            what = f"train.only[{index}] = {pattern!r} is not a regular expression: {error}."
            yield Finding(("train", "only", index), what, "Mend it.")


RULES = (
    one_length,
    one_interval,
    one_warmup,
    decay_after_warmup,
    micro_batch_divides_batch,
    evaluation_needs_rows,
    pretraining_learns_everything,
    formats_are_known,
    conversations_stay_whole,
    weights_for_all_or_none,
    weights_mix_training_rows,
    some_length_is_left,
    shards_exist,
    windows_need_steps,
    targets_are_a_pattern,
    half_precision_needs_a_gpu,
    only_a_frozen_base_is_quantized,
    bf16_weights_are_trained_whole,
    fsdp2_settings_fit,
    deepspeed.findings,
    offloading_needs_a_gpu,
    remote_code_is_pinned,
    adapters_have_their_own_settings,
    names_are_patterns,
)
