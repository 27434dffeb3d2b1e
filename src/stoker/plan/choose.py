"""Chooses how to run: a pure function of configuration, architecture and hardware, which keeps its reasons.

For each micro-batch, the ladder is climbed down as far as memory demands and no further; the micro-batches that fit are
ranked by the time of a step. What the user set is obeyed, or refused with the nearest that would fit.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from stoker.arch import activations, arithmetic
from stoker.arch.activations import Micro
from stoker.arch.spec import ArchSpec
from stoker.config.schema import RunConfig
from stoker.errors import PlanError
from stoker.plan import execution, limits
from stoker.plan.adapter import adapter_parameters, targeted
from stoker.plan.alternatives import alternatives
from stoker.plan.hardware import Device, Hardware
from stoker.plan.ladder import Ladder, ladders
from stoker.plan.memory import GIB, VALUE_BYTES, Memory, estimate
from stoker.plan.plan import Plan, size

Precision = Literal["fp32", "bf16", "fp16"]
# Tokens at which a micro-batch reaches half of a device's speed: fixed costs of a layer's launches against its work.
# Rules of thumb until measured efficiencies take their place.
_HALF_SPEED_TOKENS = {"cpu": 64, "cuda": 256, "mps": 256}
# What copies to the host and back cost when the compute hides nearly all of it, as a share of a step.
_OFFLOAD_TIME = 0.02
# Of candidates within this share of the fastest, the one with the least memory is taken.
_AS_FAST = 1.03
# Pinned memory cannot be swapped out: more than this share of what the host has free is not taken.
_HOST_SHARE = 0.8
_GPU_NAMES = {"cuda": "CUDA GPU", "mps": "Apple GPU"}


@dataclass(frozen=True)
class Statistics:
    """What is known of the prepared rows: the longest document, in tokens."""

    longest: int


@dataclass(frozen=True)
class _Machine:
    """What candidates are measured against: a device with its memory limit, and the host's memory beside it."""

    device: Device
    host_bytes: int
    precision: Precision
    uses_triton: bool


@dataclass(frozen=True)
class _Job:
    """What is to be run, on rows of so many tokens, and what follows from it."""

    config: RunConfig
    spec: ArchSpec
    machine: _Machine
    row_tokens: int

    @cached_property
    def counts(self) -> tuple[int, int]:
        """How many parameters are trained and how many are frozen."""
        total = arithmetic.num_parameters(self.spec)
        adapter = self.config.adapter
        return (adapter_parameters(self.spec, adapter), total) if adapter else (total, 0)

    @cached_property
    def product_values(self) -> int:
        """What adapters keep beside a layer's tensors, values a token."""
        adapter, layers = self.config.adapter, max(1, len(self.spec.layers))
        return adapter.rank * len(targeted(self.spec, adapter.targets)) // layers if adapter else 0

    @cached_property
    def ladders(self) -> tuple[Ladder, ...]:
        """What the user allows, from the least to the most that is computed again."""
        engine = self.config.engine
        steps = ladders(
            len(self.spec.layers),
            asked=engine.recompute,
            offload=engine.offload_activations,
            can_fuse=not execution.why_op_by_op(self.config.adapter),
            can_offload=self.machine.device.kind == "cuda",
            fuses_all=self.machine.uses_triton,
        )
        return tuple(steps)

    @cached_property
    def flops(self) -> float:
        """FLOPs of a trained token when nothing is computed again."""
        frozen_base = self.config.adapter is not None
        return arithmetic.training_flops_per_token(self.spec, self.row_tokens, frozen_base=frozen_base)

    def flops_with(self, ladder: Ladder) -> float:
        """FLOPs of a trained token with what is computed again."""
        is_fused = ladder.layers == "fused"
        again = activations.recomputed_flops_per_token(self.spec, self.row_tokens, ladder.keep, is_fused=is_fused)
        return self.flops + again

    def memory(self, tokens: int, *, casts_by_layer: bool) -> Memory:
        """Bytes of a micro-batch besides the layers' activations."""
        trained, frozen = self.counts
        return estimate(
            self.spec,
            trained=trained,
            frozen=frozen,
            optimizer=self.config.train.optimizer,
            tokens=tokens,
            precision=self.machine.precision,
            device=self.machine.device.kind,
            quantization=self.config.model.quantization,
            casts_by_layer=casts_by_layer,
        )


class _Size:
    """A micro-batch of so many rows, to try ladders with."""

    def __init__(self, job: _Job, rows: int) -> None:
        self.job, self.rows = job, rows
        tokens = rows * job.row_tokens
        self._micro = Micro(tokens, VALUE_BYTES[job.machine.precision], job.product_values)
        self._besides = {fused: job.memory(tokens, casts_by_layer=fused) for fused in (False, True)}

    def candidate(self, ladder: Ladder) -> "_Candidate":
        """Returns what this micro-batch takes with `ladder`."""
        spec, besides = self.job.spec, self._besides[ladder.layers == "fused"]
        memory = besides.with_activations(ladder.device_bytes(spec, self._micro))
        return _Candidate(self, ladder, memory, ladder.host_bytes(spec, self._micro) if ladder.offload else 0)

    def best(self) -> "_Candidate":
        """Returns the candidate that computes least again of those that fit, or else the nearest to fitting."""
        allowed = self.job.machine.host_bytes
        each = [self.candidate(ladder) for ladder in self.job.ladders]
        nearest = min(each, key=lambda one: (one.host_bytes > allowed, one.memory.total))
        return next((one for one in each if one.fits), nearest)


@dataclass(frozen=True)
class _Candidate:
    size: _Size
    ladder: Ladder
    memory: Memory
    host_bytes: int

    @property
    def rows(self) -> int:
        return self.size.rows

    @property
    def fits(self) -> bool:
        machine = self.size.job.machine
        return self.memory.total <= machine.device.memory_bytes and self.host_bytes <= machine.host_bytes

    @cached_property
    def time(self) -> float:
        """Of a token, in units of one that computes nothing again at full speed."""
        job = self.size.job
        work = job.flops_with(self.ladder) / job.flops + _OFFLOAD_TIME * self.ladder.offload
        return work * (1.0 + _HALF_SPEED_TOKENS[job.machine.device.kind] / (self.rows * job.row_tokens))


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
    kernels, kernels_reason = execution.kernels(config, device)
    quantization, quantization_reason = execution.quantization(config, device)
    execution.refuse_unknown_rungs(config, device)
    row_tokens = _row_tokens(config, statistics)
    machine = _machine(config, hardware, device, precision, uses_triton=kernels == "triton")
    job = _Job(config, spec, machine, row_tokens)
    candidates = _candidates(job)
    fitting = [one for one in candidates if one.fits]
    if not fitting:
        raise PlanError(_shortfall(job, candidates), fix=_what_fits(job, hardware))
    best = _best(fitting)
    num_threads, threads_reason = _num_threads(config, hardware)
    trained, frozen = job.counts
    return Plan(
        device=device.kind,
        device_name=device.name,
        strategy="single",
        precision=precision,
        quantization=quantization,
        kernels=kernels,
        layers=best.ladder.layers,
        micro_batch_size=best.rows,
        accumulation_steps=config.train.batch_size // best.rows,
        keep=best.ladder.keep,
        offload_activations=best.ladder.offload,
        num_threads=num_threads,
        row_tokens=row_tokens,
        num_parameters=trained + frozen,
        num_trained_parameters=trained,
        flops_per_token=job.flops_with(best.ladder),
        memory=best.memory,
        host_bytes=best.host_bytes,
        available_bytes=machine.device.memory_bytes,
        reasons={
            "device": device_reason,
            "strategy": _said(config.engine.strategy, "one device"),
            "precision": precision_reason,
            "quantization": quantization_reason,
            "kernels": kernels_reason,
            "layers": execution.layers_reason(config, best.ladder.layers, uses_triton=kernels == "triton"),
            "micro_batch_size": _micro_batch_reason(best),
            "recompute": _recompute_reason(best),
            "offload_activations": _offload_reason(best),
            "num_threads": threads_reason,
        },
    )


def _machine(
    config: RunConfig, hardware: Hardware, device: Device, precision: Precision, *, uses_triton: bool
) -> _Machine:
    limit = config.engine.memory_limit_gib
    host = hardware.first("cpu")
    if limit is not None:
        device = replace(device, memory_bytes=min(device.memory_bytes, int(limit * GIB)))
    host_bytes = int(_HOST_SHARE * host.memory_bytes) if host else 0
    return _Machine(device, host_bytes, precision, uses_triton)


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


def _candidates(job: _Job) -> list[_Candidate]:
    """Returns the best candidate of each micro-batch that the user allows."""
    batch_size, asked = job.config.train.batch_size, job.config.engine.micro_batch_size
    sizes = [n for n in range(1, batch_size + 1) if batch_size % n == 0] if asked == "auto" else [asked]
    return [_Size(job, rows).best() for rows in sizes]


def _best(fitting: list[_Candidate]) -> _Candidate:
    fastest = min(candidate.time for candidate in fitting)
    return min((one for one in fitting if one.time <= _AS_FAST * fastest), key=lambda one: one.memory.total)


def _micro_batch_reason(best: _Candidate) -> str:
    job, rows = best.size.job, best.rows
    if job.config.engine.micro_batch_size != "auto":
        return "set in the configuration"
    tokens = f"{rows * job.row_tokens:,} tokens at once"
    batch_size = job.config.train.batch_size
    if rows == batch_size:
        return f"{tokens}: the whole step"
    larger = next(n for n in range(rows + 1, batch_size + 1) if batch_size % n == 0)
    fits = _Size(job, larger).best().fits
    return f"{tokens}: more would hardly be faster" if fits else f"{tokens}: more does not fit"


def _recompute_reason(best: _Candidate) -> str:
    job = best.size.job
    if job.config.engine.recompute != "auto":
        return "set in the configuration"
    if set(best.ladder.keep) <= {"all"}:
        return "all that the backward needs fits in memory"
    whole = replace(best.ladder, keep=("all",) * len(job.spec.layers), offload=False)
    needed, allowed = best.size.candidate(whole).memory.total, job.machine.device.memory_bytes
    return f"as much as fits: keeping all needs {size(needed)} of {size(allowed)}"


def _offload_reason(best: _Candidate) -> str:
    job = best.size.job
    if job.config.engine.offload_activations != "auto":
        return "set in the configuration"
    if best.ladder.offload:
        return f"{size(best.host_bytes)} of what layers keep wait in pinned host memory"
    on_gpu = job.machine.device.kind == "cuda"
    return "it fits on the device" if on_gpu else "only a CUDA GPU has another memory beside it"


def _shortfall(job: _Job, candidates: list[_Candidate]) -> str:
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


def _what_fits(job: _Job, hardware: Hardware) -> str:
    """Returns the first change that would make the run fit, as advice."""
    machine = job.machine
    whole = hardware.first(machine.device.kind) or machine.device
    for advice, config, tokens in alternatives(job.config, job.row_tokens):
        allowed = _machine(config, hardware, whole, machine.precision, uses_triton=machine.uses_triton)
        if any(one.fits for one in _candidates(_Job(config, job.spec, allowed, tokens))):
            return f"What would fit: {advice}."
    return "No setting makes it fit here: choose a smaller model, or a device with more memory."
