"""What a run could be: each micro-batch with each step of the ladder, its memory and its time.

Time is in units of a token that computes nothing again at full speed, good for comparing candidates only.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from stoker.arch.activations import Micro
from stoker.arch.borrowed import AnySpec
from stoker.config.schema import RunConfig
from stoker.plan import execution, facts
from stoker.plan.adapter import adapter_parameters, targeted
from stoker.plan.hardware import Device
from stoker.plan.ladder import Ladder, ladders_of
from stoker.plan.memory import VALUE_BYTES, Memory, estimate

Precision = Literal["fp32", "bf16", "fp16"]
# Tokens at which a micro-batch reaches half of a device's speed: fixed costs of a layer's launches against its work.
# Rules of thumb until measured efficiencies take their place.
_HALF_SPEED_TOKENS = {"cpu": 64, "cuda": 256, "mps": 256}
# What copies to the host and back cost when the compute hides nearly all of it, as a share of a step.
_OFFLOAD_TIME = 0.02


@dataclass(frozen=True)
class Machine:
    """What candidates are measured against: a device with its memory limit, and the host's memory beside it."""

    device: Device
    host_bytes: int
    precision: Precision
    uses_triton: bool


@dataclass(frozen=True)
class Job:
    """What is to be run, on rows of so many tokens, and what follows from it; `given` is the only ladder to try."""

    config: RunConfig
    spec: AnySpec
    machine: Machine
    row_tokens: int
    given: Ladder | None = None

    @cached_property
    def counts(self) -> tuple[int, int]:
        """How many parameters are trained and how many are frozen."""
        total = facts.num_parameters(self.spec)
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
        if self.given is not None:
            return (self.given,)
        engine = self.config.engine
        return ladders_of(
            self.spec,
            asked=engine.recompute,
            offload=engine.offload_activations,
            can_fuse=not execution.why_op_by_op(self.config.adapter, self.spec),
            can_offload=self.machine.device.kind == "cuda",
            fuses_all=self.machine.uses_triton,
        )

    @cached_property
    def flops(self) -> float:
        """FLOPs of a trained token when nothing is computed again."""
        frozen_base = self.config.adapter is not None
        return facts.training_flops_per_token(self.spec, self.row_tokens, frozen_base=frozen_base)

    def flops_with(self, ladder: Ladder) -> float:
        """FLOPs of a trained token with what is computed again."""
        is_fused = ladder.layers == "fused"
        again = facts.recomputed_flops_per_token(self.spec, self.row_tokens, ladder.keep, is_fused=is_fused)
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
            weight_dtype=self.config.train.weight_dtype,
            casts_by_layer=casts_by_layer,
        )


class Size:
    """A micro-batch of so many rows of a job, to try ladders with."""

    def __init__(self, job: Job, rows: int) -> None:
        self.job, self.rows = job, rows
        tokens = rows * job.row_tokens
        self.micro = Micro(tokens, VALUE_BYTES[job.machine.precision], job.product_values)
        self._besides = {fused: job.memory(tokens, casts_by_layer=fused) for fused in (False, True)}

    def candidate(self, ladder: Ladder) -> "Candidate":
        """Returns what this micro-batch takes with `ladder`, in tiles where they lower the peak."""
        if self.job.given is None:
            ladder = ladder.tiled(self.job.spec, self.micro)
        spec, besides = self.job.spec, self._besides[ladder.layers == "fused"]
        memory = besides.with_activations(ladder.device_bytes(spec, self.micro))
        return Candidate(self, ladder, memory, ladder.host_bytes(spec, self.micro) if ladder.offload else 0)

    def best(self) -> "Candidate":
        """Returns the candidate that computes least again of those that fit, or else the nearest to fitting."""
        allowed = self.job.machine.host_bytes
        each, ladders = [], self.job.ladders
        if min(one.total for one in self._besides.values()) > self.job.machine.device.memory_bytes:
            ladders = ladders[-1:]  # no rung helps where all else alone does not fit
        for ladder in ladders:
            each.append(self.candidate(ladder))
            if each[-1].fits:
                return each[-1]
        return min(each, key=lambda one: (one.host_bytes > allowed, one.memory.total))


@dataclass(frozen=True)
class Candidate:
    """A micro-batch with a ladder; `host_bytes`: pinned memory of the host."""

    size: Size
    ladder: Ladder
    memory: Memory
    host_bytes: int

    @property
    def rows(self) -> int:
        """Sequences that go through the model at once."""
        return self.size.rows

    @property
    def fits(self) -> bool:
        """Whether device and host have the memory."""
        machine = self.size.job.machine
        return self.memory.total <= machine.device.memory_bytes and self.host_bytes <= machine.host_bytes

    @cached_property
    def time(self) -> float:
        """Of a token, in units of one that computes nothing again at full speed."""
        job = self.size.job
        work = job.flops_with(self.ladder) / job.flops + _OFFLOAD_TIME * self.ladder.offload
        return work * (1.0 + _HALF_SPEED_TOKENS[job.machine.device.kind] / (self.rows * job.row_tokens))
