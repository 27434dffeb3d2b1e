"""Chooses how to run: a pure function of configuration, architecture and hardware, which keeps its reasons.

For each micro-batch, the ladder is climbed down as far as memory demands and no further; the micro-batches that fit are
ranked by the time of a step. What the user set is obeyed, or refused with the nearest that would fit.
"""

from dataclasses import dataclass, replace
from typing import Any

from stoker.arch.borrowed import AnySpec
from stoker.config.schema import Engine, RunConfig
from stoker.errors import PlanError
from stoker.plan import execution, limits
from stoker.plan.alternatives import alternatives
from stoker.plan.candidates import Candidate, Job, Machine, Precision, Size
from stoker.plan.execution import Kernels
from stoker.plan.hardware import Device, Hardware
from stoker.plan.ladder import Ladder
from stoker.plan.memory import GIB, rounded_head_bytes, transposed_bytes
from stoker.plan.plan import Plan, size
from stoker.plan.rates import Rates
from stoker.plan.rates import of as rates_of
from stoker.plan.spread import SINGLE, Spread, beyond_sharing

# Of candidates within this share of the fastest, the one with the least memory is taken, if any without the host's.
_AS_FAST = 1.03
# Pinned memory cannot be swapped out: more than this share of what the host has free is not taken.
_HOST_SHARE = 0.8
_GPU_NAMES = {"cuda": "CUDA GPU", "mps": "Apple GPU"}


class MemoryPlanError(PlanError):
    """There is not the memory for what was asked; the message names the nearest for which there is."""


@dataclass(frozen=True)
class Statistics:
    """What is known of the prepared rows: the longest document, in tokens."""

    longest: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a plan may be made with, besides configuration, architecture and machine."""

    statistics: Statistics | None = None
    """Of the rows, where they are prepared."""
    ladder: Ladder | None = None
    """The one to run with, if it still fits: that of a run that goes on."""
    spread: Spread = SINGLE
    """Over which devices; the configuration has one's rows."""
    rates: Rates | None = None
    """The device's speed; the catalogue's unless given."""
    advise: bool = True
    """Let the error for what does not fit say what would, which takes longer than the plan."""
    force: bool = False
    """Where nothing fits, plan what is nearest to it."""


def choose(config: RunConfig, spec: AnySpec, hardware: Hardware, **options: Any) -> Plan:
    """Returns the plan of a run, with `Options` by name.

    Raises:
        PlanError: what was asked for does not exist on this hardware, or does not fit in its memory; the message
            names the nearest that does.
    """
    check(config, spec)
    return settle(config, spec, hardware, Options(**options)).plan()


def check(config: RunConfig, spec: AnySpec) -> None:
    """Raises PlanError for what this model cannot do of what is asked, whatever the hardware."""
    problems = limits.problems(config, spec)
    if problems:
        raise PlanError([problem for _, problem in problems])


def check_device(config: RunConfig, spec: AnySpec | None, hardware: Hardware) -> tuple[Device, Precision, Kernels]:
    """Returns where a run computes, in which format and with which kernels.

    Raises PlanError for what is asked for and the device has not; without `spec`, whatever the model.
    """
    device, _ = _device(config, hardware)
    precision, _ = _precision(config, device)
    kernels, _ = execution.kernels(config, device)
    execution.quantization(config, device)
    execution.refuse_unknown_rungs(config, spec, device)
    return device, precision, kernels


@dataclass(frozen=True)
class Choice:
    """The best candidate of a run that was checked; `plan` says it in full, with the reasons, which take longer.

    `climbed` is what the ladder was climbed with: the same, but that layers are let go after their forward.
    """

    best: Candidate
    climbed: Candidate
    hardware: Hardware
    is_forced: bool

    def plan(self) -> Plan:
        """Returns the plan with the reasons for each choice."""
        return _plan(self)


def settle(config: RunConfig, spec: AnySpec, hardware: Hardware, options: Options) -> Choice:
    """Returns what `choose` plans, of a run that `check` lets through; errors are those of `choose`."""
    asked = options.spread
    # What is asked of them must not cost layers what they keep, which is dearer to make again: decided last.
    spread = replace(asked, reshards=True) if asked.reshards is None else asked
    device, precision, kernels = check_device(config, spec, hardware)
    row_tokens = _row_tokens(config, options.statistics)
    machine = _machine(config, hardware, device, precision, uses_triton=kernels == "triton")
    # Processes of a node share its host.
    machine = replace(machine, host_bytes=machine.host_bytes // min(spread.per_node, spread.num_processes))
    rates = options.rates or rates_of(device, num_threads=hardware.num_threads)
    job = Job(config, spec, machine, row_tokens, options.ladder, spread, rates)
    candidates = _candidates(job)
    fitting = [one for one in candidates if one.fits]
    if not fitting and options.ladder is not None:
        return settle(config, spec, hardware, replace(options, ladder=None))
    is_forced = options.force and not fitting
    if is_forced:
        fitting = [min(candidates, key=lambda one: one.memory.total)]
    if not fitting:
        raise MemoryPlanError(_shortfall(job, candidates), fix=_what_fits(job, hardware) if options.advise else None)
    climbed = best = _best(fitting)
    if config.engine.cuda_graphs is True:
        _cuda_graphs(best)
    if asked.reshards is None:
        stays = best.gathered()
        best = stays if stays.fits else best
    return Choice(best, climbed, hardware, is_forced)


def _plan(choice: Choice) -> Plan:
    best, climbed, hardware = choice.best, choice.climbed, choice.hardware
    job = best.size.job
    config, spec, machine, spread = job.config, job.spec, job.machine, job.spread
    device, device_reason = _device(config, hardware)
    precision, precision_reason = _precision(config, device)
    kernels, kernels_reason = execution.kernels(config, device)
    quantization, quantization_reason = execution.quantization(config, device)
    transposed_reason, head_reason = _copies_reasons(best)
    graphs, graphs_reason = _cuda_graphs(best)
    num_threads, threads_reason = _num_threads(config, hardware)
    trained, frozen = job.counts
    micro_batch_reason = "by force: the plan says it does not fit" if choice.is_forced else _micro_batch_reason(climbed)
    return Plan(
        device=device.kind,
        device_name=device.name,
        strategy=spread.strategy,
        precision=precision,
        quantization=quantization,
        keep_transposed=best.keep_transposed,
        head_in_fp8=best.head_in_fp8,
        kernels=kernels,
        layers=best.ladder.layers,
        micro_batch_size=best.rows,
        accumulation_steps=config.train.batch_size // best.rows,
        keep=best.ladder.keep,
        tile_tokens=best.ladder.tile_tokens,
        offload_activations=best.ladder.offload,
        staying_layers=best.ladder.staying,
        cuda_graphs=graphs,
        num_threads=num_threads,
        row_tokens=job.row_tokens,
        num_parameters=trained + frozen,
        num_trained_parameters=trained,
        flops_per_token=job.flops_with(best.ladder),
        memory=best.with_copies,
        host_bytes=best.host_bytes,
        available_bytes=machine.device.memory_bytes,
        reasons={
            "device": device_reason,
            "strategy": _strategy_said(config.engine, spread),
            "reshards": _reshards_reason(choice),
            "precision": precision_reason,
            "quantization": quantization_reason,
            "keep_transposed": transposed_reason,
            "head_in_fp8": head_reason,
            "kernels": kernels_reason,
            "layers": execution.layers_reason(config, spec, best.ladder.layers, uses_triton=kernels == "triton"),
            "micro_batch_size": micro_batch_reason,
            "recompute": _recompute_reason(climbed),
            "tile_tokens": _tiles_reason(best),
            "offload_activations": _offload_reason(best),
            "cuda_graphs": graphs_reason,
            "num_threads": threads_reason,
        },
        num_processes=spread.num_processes,
        per_node=spread.per_node,
        stage=spread.stage,
        replicas=spread.replicas,
        reshards=spread.reshards if spread.strategy == "fsdp2" else None,
        on_host=tuple(sorted(spread.on_host)),
        sharing=spread.sharing,
        on_disk=tuple(sorted(spread.on_disk)),
        bucket_values=spread.bucket_values,
        param_dtype=spread.param_dtype,
        reduce_dtype=spread.reduce_dtype,
    )


def _machine(
    config: RunConfig, hardware: Hardware, device: Device, precision: Precision, *, uses_triton: bool
) -> Machine:
    limit = config.engine.memory_limit_gib
    host = hardware.first("cpu")
    if limit is not None:
        device = replace(device, memory_bytes=min(device.memory_bytes, int(limit * GIB)))
    host_bytes = int(_HOST_SHARE * host.memory_bytes) if host else 0
    return Machine(device, host_bytes, precision, uses_triton)


def _strategy_said(engine: Engine, spread: Spread) -> str:
    asked = engine.strategy
    if spread.strategy == "single" and asked not in ("auto", "single"):
        return f"one device: {asked} has nothing to share; checkpoints resume on more"
    if spread.num_processes == 1 and (more := beyond_sharing(engine)):
        said = f"set in the configuration, and one device has use for {', '.join(more)}"
        if spread.shares_frozen and spread.copies_weights:
            return f"{said}; it brings each layer's weights from the host before its work"
        copies = "; it copies what each layer trains before its work, which single does not"
        return said + copies if spread.copies_weights else said
    return _said(asked, _strategy_reason(spread))


def _strategy_reason(spread: Spread) -> str:
    if spread.num_processes == 1:
        return "one device"
    part = "a part of each weight" if spread.weight_shards > 1 else "the whole model"
    return f"{spread.num_processes} processes, each with {part}"


def _reshards_reason(choice: Choice) -> str:
    best, climbed = choice.best, choice.climbed
    spread, engine = best.spread, climbed.size.job.config.engine
    if spread.strategy != "fsdp2":
        return "no layer is gathered"
    if engine.fsdp2.reshard_after_forward != "auto":
        return "set in the configuration"
    done = "copied" if spread.copies_weights else "gathered"
    if best is not climbed:
        more = best.memory.total - climbed.memory.total
        return f"{size(more)} that are free: layers are {done} once a micro-batch, not again for the backward"
    needed, allowed = climbed.gathered().memory.total, climbed.size.job.machine.device.memory_bytes
    return f"layers are {done} again for the backward: to stay they would need {size(needed)} of {size(allowed)} in all"


def _said(value: object, reason: str) -> str:
    """Returns the reason for a choice: the user's word where they gave one."""
    return reason if value == "auto" else "set in the configuration"


def _device(config: RunConfig, hardware: Hardware) -> tuple[Device, str]:
    asked = config.engine.device
    if asked != "auto":
        device = hardware.first(asked)
        if device is None:
            raise PlanError(
                f"engine.device = {asked}, but PyTorch finds no {_GPU_NAMES.get(asked, asked)} on this machine.",
                fix="Use auto, or run `stoker doctor` to see what is missing.",
            )
        return device, f"set in the configuration: {device.name}"
    for kind in ("cuda", "mps", "cpu"):
        device = hardware.first(kind)
        if device is not None:
            return device, f"{device.name}" if kind != "cpu" else f"no GPU that PyTorch can use: {device.name}"
    raise PlanError("no device was found to train on.", fix="Run `stoker doctor` to see what is missing.")


def _precision(config: RunConfig, device: Device) -> tuple[Precision, str]:
    asked = config.engine.precision
    if asked == "fp16" and device.kind == "cpu":
        raise PlanError("engine.precision = fp16 needs a GPU; this run is on the CPU.", fix="Use auto, fp32 or bf16.")
    if asked == "bf16" and device.kind == "cuda" and not device.bf16:
        raise PlanError(f"engine.precision = bf16, but {device.name} does not compute in it.", fix="Use fp16 or auto.")
    if config.train.weight_dtype == "bf16":
        return _precision_of_bf16_weights(asked, device)
    if asked != "auto":
        return asked, "set in the configuration"
    if device.kind != "cuda":
        return "fp32", f"safest on {'a CPU' if device.kind == 'cpu' else 'an Apple GPU'}"
    return ("bf16", f"{device.name} computes in it") if device.bf16 else ("fp16", f"{device.name} has no bf16")


def _precision_of_bf16_weights(asked: str, device: Device) -> tuple[Precision, str]:
    if asked not in ("auto", "bf16"):
        raise PlanError(
            f"engine.precision = {asked}, but with train.weight_dtype = bf16 weights are bf16.", fix="Use bf16 or auto."
        )
    if device.kind == "cuda" and not device.bf16:
        raise PlanError(
            f"train.weight_dtype = bf16, but {device.name} does not compute in it.", fix="Use weight_dtype: fp32."
        )
    return "bf16", _said(asked, "train.weight_dtype is bf16")


def _row_tokens(config: RunConfig, statistics: Statistics | None) -> int:
    """Returns the tokens of a row at most: packed rows are full, others as long as the longest document."""
    length = config.data.sequence_length
    if config.data.packing or statistics is None:
        return length
    return min(length, -(-statistics.longest // 8) * 8)


def _num_threads(config: RunConfig, hardware: Hardware) -> tuple[int, str]:
    asked = config.engine.num_threads
    if asked == "auto":
        return hardware.num_threads, "one for each core"
    return asked, "set in the configuration"


def _candidates(job: Job) -> list[Candidate]:
    """Returns the best candidate of each micro-batch that the user allows, up to the first that does not fit.

    A larger one holds more of everything, and would not fit either.
    """
    batch_size, asked = job.config.train.batch_size, job.config.engine.micro_batch_size
    sizes = [n for n in range(1, batch_size + 1) if batch_size % n == 0] if asked == "auto" else [asked]
    found: list[Candidate] = []
    for rows in sizes:
        found.append(Size(job, rows).best())
        if not found[-1].fits:
            break
    return found


def _best(fitting: list[Candidate]) -> Candidate:
    if len(fitting) == 1:
        return fitting[0]
    fastest = min(one.seconds for one in fitting)
    as_fast = (one for one in fitting if one.seconds <= _AS_FAST * fastest)
    return min(as_fast, key=lambda one: (one.host_bytes > 0, one.memory.total))


def _copies_reasons(best: Candidate) -> tuple[str, str]:
    """Returns why fp8 weights stay transposed too or do not, and why the head is in fp8 or is not.

    They are the last things that memory goes to: the same bytes spare more time where they spare a layer's
    recomputation.
    """
    job, memory = best.size.job, best.with_transposed
    if memory is None:
        return "only fp8 products need weights transposed", "only an fp8 base has a head in fp8"
    count, allowed = transposed_bytes(job.spec), job.machine.device.memory_bytes
    if not best.keep_transposed:
        needed = f"copies would need {size(memory.total)} of {size(allowed)} in all"
        return f"each backward transposes each weight: {needed}", "memory for copies of weights is not there"
    transposed = f"{size(count)} that are free: no backward transposes a weight again"
    count = rounded_head_bytes(job.spec)
    if best.head_in_fp8:
        return transposed, f"{size(count)} that are free: logits and their gradient by fp8 products"
    why_not = execution.why_no_fp8_head(job.spec, job.machine.device, job.spread)
    return transposed, why_not or f"{size(count)} more would need {size(memory.total + count)} of {size(allowed)}"


def _micro_batch_reason(best: Candidate) -> str:
    job, rows = best.size.job, best.rows
    if job.config.engine.micro_batch_size != "auto":
        return "set in the configuration"
    tokens = f"{rows * job.row_tokens:,} tokens at once"
    batch_size = job.config.train.batch_size
    if rows == batch_size:
        return f"{tokens}: the whole step"
    larger = next(n for n in range(rows + 1, batch_size + 1) if batch_size % n == 0)
    fits = Size(job, larger).best().fits
    return f"{tokens}: more would hardly be faster" if fits else f"{tokens}: more does not fit"


def _recompute_reason(best: Candidate) -> str:
    job = best.size.job
    if job.config.engine.recompute != "auto":
        return "set in the configuration"
    if set(best.ladder.keep) <= {"all"}:
        return "all that the backward needs fits in memory"
    whole = replace(best.ladder, keep=("all",) * len(job.spec.layers), offload=False, tile_tokens=None, staying=0)
    needed, allowed = best.size.candidate(whole).memory.total, job.machine.device.memory_bytes
    return f"as much as fits: keeping all needs {size(needed)} of {size(allowed)}"


def _tiles_reason(best: Candidate) -> str:
    if best.ladder.tile_tokens is None:
        return "gate and up of a whole micro-batch are not what is highest"
    spec, micro = best.size.job.spec, best.size.micro
    whole = replace(best.ladder, tile_tokens=None).device_bytes(spec, micro)
    spared = size(whole - best.ladder.device_bytes(spec, micro))
    return f"feed-forward in tiles of {best.ladder.tile_tokens:,} tokens: all at once would need {spared} more"


def _offload_reason(best: Candidate) -> str:
    job, ladder = best.size.job, best.ladder
    count = f"of the first {ladder.num_away} of {len(ladder.keep)} layers" if ladder.offload and ladder.staying else ""
    if job.config.engine.offload_activations != "auto":
        return f"set in the configuration: {count}" if count else "set in the configuration"
    if ladder.offload:
        return f"{size(best.host_bytes)} {count or 'of what layers keep'} wait in pinned host memory"
    on_gpu = job.machine.device.kind == "cuda"
    return "it fits on the device" if on_gpu else "only a CUDA GPU has another memory beside it"


def _cuda_graphs(best: Candidate) -> tuple[bool, str]:
    """Returns whether micro-batches are captured, and why; raises PlanError where that is asked for and cannot be."""
    job = best.size.job
    asked, hindrance = job.config.engine.cuda_graphs, best.why_no_graphs
    if asked is True:
        impossible = job.why_no_graphs(offload=best.ladder.offload)
        if impossible:
            raise PlanError(f"engine.cuda_graphs = true: {impossible}.", fix="Use false or auto, or change that.")
    if asked != "auto":
        return asked, "set in the configuration"
    return not hindrance, hindrance or "the GPU would wait for launches: one a micro-batch, once a shape was captured"


def _shortfall(job: Job, candidates: list[Candidate]) -> str:
    device = job.machine.device
    least = min(candidates, key=lambda one: one.memory.total)
    memory = least.memory
    if memory.total <= device.memory_bytes:
        return (
            f"what layers keep needs {size(least.host_bytes)} of pinned host memory; "
            f"the host can give {size(job.machine.host_bytes)}."
        )
    parts = f"weights {size(memory.weights)}, activations {size(memory.activations)}"
    word = "free" if job.config.engine.memory_limit_gib is None else "allowed"
    return f"the run needs about {size(memory.total)} ({parts}); {device.name} has {size(device.memory_bytes)} {word}."


def _what_fits(job: Job, hardware: Hardware) -> str:
    """Returns the first change that would make the run fit, as advice."""
    machine = job.machine
    whole = hardware.first(machine.device.kind) or machine.device
    for advice, config, tokens in alternatives(job.config, job.row_tokens, has_bf16=_has_bf16(whole)):
        precision, _ = _precision(config, whole)
        allowed = _machine(config, hardware, whole, precision, uses_triton=machine.uses_triton)
        other = Job(config, job.spec, allowed, tokens, spread=job.spread, rates=job.rates)
        if any(one.fits for one in _candidates(other)):
            return f"What would fit: {advice}."
    return "No setting makes it fit here: choose a smaller model, or a device with more memory."


def _has_bf16(device: Device) -> bool:
    return device.kind != "cuda" or device.bf16
