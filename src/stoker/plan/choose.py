"""Chooses how to run: a pure function of configuration, architecture and hardware, which keeps its reasons.

Every candidate (recompute x micro-batch) that fits in memory is ranked by the time of a step; what the user set is
obeyed, or refused with the nearest that would fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stoker.arch import arithmetic
from stoker.arch.arithmetic import Recompute
from stoker.arch.spec import ArchSpec
from stoker.config.schema import Adafactor, Adapter, RunConfig
from stoker.errors import PlanError
from stoker.plan import limits
from stoker.plan.adapter import adapter_parameters
from stoker.plan.hardware import Device, Hardware
from stoker.plan.memory import Memory, estimate
from stoker.plan.plan import Plan, size

Precision = Literal["fp32", "bf16", "fp16"]
# Tokens at which a micro-batch reaches half of a device's speed: fixed costs of a layer's launches against its work.
# Rules of thumb until measured efficiencies take their place.
_HALF_SPEED_TOKENS = {"cpu": 64, "cuda": 1024, "mps": 256}
# Block recompute runs the forward once more: four thirds of forward plus backward at twice the forward's work.
_RECOMPUTE_TIME = {"none": 1.0, "block": 4.0 / 3.0}
# Of candidates within this share of the fastest, the one with the least memory is taken.
_AS_FAST = 1.03
_GPU_NAMES = {"cuda": "CUDA GPU", "mps": "Apple GPU"}


@dataclass(frozen=True)
class Statistics:
    """What is known of the prepared rows: the longest document, in tokens."""

    longest: int


@dataclass(frozen=True)
class _Candidate:
    micro_batch_size: int
    recompute: Recompute
    memory: Memory
    time: float


def choose(config: RunConfig, spec: ArchSpec, hardware: Hardware, *, statistics: Statistics | None = None) -> Plan:
    """Returns the plan of a run.

    Raises:
        PlanError: what was asked for does not exist on this hardware, or does not fit in its memory; the message
            names the nearest that does.
    """
    problems = limits.problems(config, spec)
    if problems:
        raise PlanError([problem for _, problem in problems])
    device, device_reason = _device(config, hardware)
    precision, precision_reason = _precision(config, device)
    row_tokens = _row_tokens(config, statistics)
    candidates = list(_candidates(config, spec, device, precision, row_tokens))
    fitting = [candidate for candidate in candidates if candidate.memory.total <= device.memory_bytes]
    if not fitting:
        least = min(candidates, key=_by_memory).memory
        raise PlanError(_shortfall(least, device), fix=_what_fits(config, spec, device, precision, row_tokens))
    best = _best(fitting)
    num_threads, threads_reason = _num_threads(config, hardware)
    trained, frozen = _parameter_counts(config, spec)
    flops = arithmetic.training_flops_per_token(
        spec, row_tokens, frozen_base=config.adapter is not None, recompute=best.recompute
    )
    return Plan(
        device=device.kind,
        device_name=device.name,
        strategy="single",
        precision=precision,
        kernels="reference",
        micro_batch_size=best.micro_batch_size,
        accumulation_steps=config.train.batch_size // best.micro_batch_size,
        recompute=best.recompute,
        num_threads=num_threads,
        row_tokens=row_tokens,
        num_parameters=trained + frozen,
        num_trained_parameters=trained,
        flops_per_token=flops,
        memory=best.memory,
        available_bytes=device.memory_bytes,
        reasons={
            "device": device_reason,
            "strategy": _said(config.engine.strategy, "one device"),
            "precision": precision_reason,
            "kernels": _said(config.engine.kernels, "plain PyTorch is what this version has"),
            "micro_batch_size": _micro_batch_reason(config, best, fitting, row_tokens),
            "recompute": _recompute_reason(config, best, candidates, device),
            "num_threads": threads_reason,
        },
    )


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
    if asked != "auto":
        return asked, "set in the configuration"
    if device.kind != "cuda":
        return "fp32", f"safest on {'a CPU' if device.kind == 'cpu' else 'an Apple GPU'}"
    return ("bf16", f"{device.name} computes in it") if device.bf16 else ("fp16", f"{device.name} has no bf16")


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


def _parameter_counts(config: RunConfig, spec: ArchSpec) -> tuple[int, int]:
    """Returns how many parameters are trained and how many are frozen."""
    total = arithmetic.num_parameters(spec)
    return (adapter_parameters(spec, config.adapter), total) if config.adapter else (total, 0)


def _candidates(
    config: RunConfig, spec: ArchSpec, device: Device, precision: Precision, row_tokens: int
) -> Iterator[_Candidate]:
    batch_size, asked = config.train.batch_size, config.engine.micro_batch_size
    sizes = [n for n in range(1, batch_size + 1) if batch_size % n == 0] if asked == "auto" else [asked]
    ladder: tuple[Recompute, ...] = (
        ("none", "block") if config.engine.recompute == "auto" else (config.engine.recompute,)
    )
    trained, frozen = _parameter_counts(config, spec)
    for recompute in ladder:
        for micro_batch_size in sizes:
            tokens = micro_batch_size * row_tokens
            memory = estimate(
                spec,
                trained=trained,
                frozen=frozen,
                optimizer=config.train.optimizer,
                tokens=tokens,
                precision=precision,
                recompute=recompute,
                device=device.kind,
            )
            time = _RECOMPUTE_TIME[recompute] * (1.0 + _HALF_SPEED_TOKENS[device.kind] / tokens)
            yield _Candidate(micro_batch_size, recompute, memory, time)


def _by_memory(candidate: _Candidate) -> int:
    return candidate.memory.total


def _best(fitting: list[_Candidate]) -> _Candidate:
    fastest = min(candidate.time for candidate in fitting)
    return min((one for one in fitting if one.time <= _AS_FAST * fastest), key=_by_memory)


def _micro_batch_reason(config: RunConfig, best: _Candidate, fitting: list[_Candidate], row_tokens: int) -> str:
    if config.engine.micro_batch_size != "auto":
        return "set in the configuration"
    sizes = [one.micro_batch_size for one in fitting if one.recompute == best.recompute]
    tokens = f"{best.micro_batch_size * row_tokens:,} tokens at once"
    if best.micro_batch_size == config.train.batch_size:
        return f"{tokens}: the whole step"
    return (
        f"{tokens}: more would hardly be faster"
        if max(sizes) > best.micro_batch_size
        else f"{tokens}: more does not fit"
    )


def _recompute_reason(config: RunConfig, best: _Candidate, candidates: list[_Candidate], device: Device) -> str:
    if config.engine.recompute != "auto":
        return "set in the configuration"
    if best.recompute == "none":
        return "what the forward keeps fits in memory"
    without = min((one.memory.total for one in candidates if one.recompute == "none"), default=0)
    if without > device.memory_bytes:
        return f"without it even the smallest micro-batch needs {size(without)}"
    return "it allows a larger micro-batch, which saves more time than it costs"


def _shortfall(least: Memory, device: Device) -> str:
    parts = f"weights {size(least.weights)}, activations {size(least.activations)}"
    return f"the run needs about {size(least.total)} ({parts}); {device.name} has {size(device.memory_bytes)} free."


def _what_fits(config: RunConfig, spec: ArchSpec, device: Device, precision: Precision, row_tokens: int) -> str:
    """Returns the first change that would make the run fit, as advice."""
    for advice, changed, tokens in _alternatives(config, row_tokens):
        found = _candidates(changed, spec, device, precision, tokens)
        if any(candidate.memory.total <= device.memory_bytes for candidate in found):
            return f"What would fit: {advice}."
    return "No setting makes it fit here: choose a smaller model, or a device with more memory."


def _alternatives(config: RunConfig, row_tokens: int) -> Iterator[tuple[str, RunConfig, int]]:
    """Yields changes from the least to the most far-reaching, each including those before it."""
    engine = config.engine.model_copy(update={"micro_batch_size": "auto"})
    config = config.model_copy(update={"engine": engine})
    yield "engine.micro_batch_size: auto", config, row_tokens
    config = config.model_copy(update={"engine": engine.model_copy(update={"recompute": "auto"})})
    yield "engine.recompute: auto", config, row_tokens
    tokens = row_tokens
    while tokens > 1024:
        tokens //= 2
        yield f"data.sequence_length: {tokens}", config, tokens
    if config.adapter is None:
        yield "an adapter (adapter: {kind: lora})", config.model_copy(update={"adapter": Adapter()}), row_tokens
        train = config.train.model_copy(update={"optimizer": Adafactor()})
        yield "train.optimizer: {kind: adafactor}", config.model_copy(update={"train": train}), row_tokens
