"""What a run could be: each micro-batch with each step of the ladder, its memory and its time."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from stoker.arch.activations import Keep, Micro
from stoker.arch.borrowed import AnySpec
from stoker.config.schema import Adapter, Optimizer, RunConfig
from stoker.plan import execution, facts, ladder, rates, speed
from stoker.plan.adapter import adapted, adapter_parameters, targeted
from stoker.plan.amounts import reads_lengths_once
from stoker.plan.hardware import Device
from stoker.plan.ladder import Ladder, Weighed
from stoker.plan.memory import (
    VALUE_BYTES,
    Memory,
    estimate,
    last_gradient_bytes,
    lengths_bytes,
    rounded_head_bytes,
    trained_head_bytes,
    transposed_bytes,
)
from stoker.plan.rates import Rates
from stoker.plan.remember import remember
from stoker.plan.spread import SINGLE, Spread

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Machine:
    """What candidates are measured against: a device with its memory limit, and the host's memory beside it."""

    device: Device
    host_bytes: int
    precision: Precision
    uses_triton: bool


@remember(0, 1, 2)  # an adapter's targets may be a list, which has no hash
def _estimated(spec: AnySpec, optimizer: Optimizer, adapter: Adapter | None, **sizes: Any) -> Memory:
    return estimate(spec, optimizer=optimizer, adapter=adapter, **sizes)


@dataclass(frozen=True)
class Job:
    """What is to be run, on rows of so many tokens, and what follows from it; `given` is the only ladder to try.

    `config` has the rows of one of the devices of `spread`. `rates`: the device's speed.
    """

    config: RunConfig
    spec: AnySpec
    machine: Machine
    row_tokens: int
    given: Ladder | None = None
    spread: Spread = SINGLE
    rates: Rates | None = None

    @cached_property
    def counts(self) -> tuple[int, int]:
        """How many parameters are trained and how many are frozen."""
        total = facts.num_parameters(self.spec)
        adapter = self.config.adapter
        return (adapter_parameters(self.spec, adapter), total) if adapter else (total, 0)

    @cached_property
    def settings(self) -> dict[str, object]:
        """What decides which ladders there are: what the user allows and what the layers and the device can."""
        engine = self.config.engine
        return {
            "asked": engine.recompute,
            "offload": engine.offload_activations,
            "can_fuse": not execution.why_op_by_op(self.spec),
            "can_offload": self.machine.device.kind == "cuda",
            "fuses_all": self.machine.uses_triton,
        }

    @cached_property
    def speed(self) -> Rates:
        """The device's figures."""
        return self.rates or rates.of(self.machine.device)

    @cached_property
    def flops(self) -> float:
        """FLOPs of a trained token when nothing is computed again."""
        adapter, own = self.config.adapter, 0.0
        if adapter is not None:
            names = tuple(targeted(self.spec, adapter.targets))
            own = facts.adapter_flops_per_token(self.spec, adapter.rank, names)
        return own + facts.training_flops_per_token(self.spec, self._attended_tokens, frozen_base=adapter is not None)

    def flops_with(self, ladder: Ladder) -> float:
        """FLOPs of a trained token with what is computed again."""
        config, is_fused = self.config, ladder.layers == "fused"
        adapter = adapted(self.spec, config.adapter, config.model.quantization) if config.adapter else None
        again = facts.recomputed_flops_per_token(
            self.spec, self._attended_tokens, ladder.keep, is_fused=is_fused, adapter=adapter
        )
        return self.flops + again

    def why_no_graphs(self, *, offload: bool) -> str:
        """What keeps micro-batches from being captured, or ""; `offload`: kept activations wait on the host."""
        machine = self.machine
        options = {"precision": machine.precision, "uses_triton": machine.uses_triton, "offload": offload}
        return execution.why_no_graphs(self.config, self.spec, machine.device, **options)

    @property
    def _attended_tokens(self) -> int:
        """Tokens of a whole row, of which devices that share it have parts."""
        return self.spread.sharing * self.row_tokens

    def memory(
        self, tokens: int, *, casts_by_layer: bool, head_apart: bool = False, gradients_arrive: bool = False
    ) -> Memory:
        """Bytes of a micro-batch besides the layers' activations."""
        trained, frozen = self.counts
        return _estimated(
            self.spec,
            self.config.train.optimizer,
            self.config.adapter,
            trained=trained,
            frozen=frozen,
            tokens=tokens,
            precision=self.machine.precision,
            device=self.machine.device.kind,
            quantization=self.config.model.quantization,
            weight_dtype=self.config.train.weight_dtype,
            casts_by_layer=casts_by_layer,
            head_apart=head_apart,
            gradients_arrive=gradients_arrive,
            spread=self.spread,
        )


def _head_copies(device: Device) -> int:
    """See `Micro`: gradients of keys and values are made for every query head, and before Ampere those are copied."""
    if device.kind != "cuda":
        return 0
    is_old = device.compute_capability is not None and device.compute_capability < (8, 0)
    return 4 if is_old else 2


def micro_of(
    config: RunConfig,
    spec: AnySpec,
    tokens: int,
    *,
    precision: str,
    device: Device,
    uses_triton: bool,
    gradient_bytes: float = 0,
) -> Micro:
    """Returns what decides how much layers hold of a micro-batch of so many tokens."""
    # Under autocast what is embedded, and every sum with it, keeps the dtype of trained weights.
    is_wide = config.adapter is None and config.train.weight_dtype == "fp32"
    return Micro(
        tokens,
        VALUE_BYTES[precision],
        head_copies=_head_copies(device),
        gradient_bytes=gradient_bytes,
        adapter=adapted(spec, config.adapter, config.model.quantization) if config.adapter else None,
        stream_bytes=4 if is_wide else None,
        is_plain=not uses_triton,
    )


class Size:
    """A micro-batch of so many rows of a job, to try ladders with."""

    def __init__(self, job: Job, rows: int) -> None:
        self.job, self.rows = job, rows
        tokens = rows * job.row_tokens
        self.micro = micro_of(
            job.config,
            job.spec,
            tokens,
            precision=job.machine.precision,
            device=job.machine.device,
            uses_triton=job.machine.uses_triton,
            gradient_bytes=self._gradient_bytes(),
        )
        # Where gradients arrive the head's moment is one of its own (`_beside_head`).
        apart = bool(self.micro.gradient_bytes) and job.config.adapter is None
        arrive = bool(self.micro.gradient_bytes)
        self._besides = {
            fused: job.memory(tokens, casts_by_layer=fused, head_apart=apart and fused, gradients_arrive=arrive)
            for fused in (False, True)
        }

    def _gradient_bytes(self) -> float:
        """See `Micro.gradient_bytes`: each step's gradients are new, unless graphs of micro-batches add to old ones.

        AdamW's of adapters beside graphs do not: they are laid side by side at a backward's end, in memory that
        activations had (`distributed.graphs`).
        """
        config, job = self.job.config, self.job
        spread, each = job.spread, 2 if config.train.weight_dtype == "bf16" and config.adapter is None else 4
        if self.rows < config.train.batch_size:
            return 0
        if spread.strategy == "fsdp2" and config.adapter is None:
            return 0 if "gradients" in spread.on_host else each / spread.gradient_shards
        if spread.num_processes > 1:
            return 0
        if config.adapter is not None and config.train.optimizer.kind == "adamw":
            return 4
        if config.engine.cuda_graphs is True or (config.engine.cuda_graphs == "auto" and self._may_be_captured()):
            return 0
        return each

    @cached_property
    def _lengths_bytes(self) -> int:
        """See `memory.lengths_bytes`; 0 without DoRA."""
        config = self.job.config
        if config.adapter is None or config.adapter.kind != "dora":
            return 0
        in_pieces = not reads_lengths_once(config.adapter.rank, uses_triton=self.job.machine.uses_triton)
        return lengths_bytes(self.job.spec, config.model.quantization, self.micro.value_bytes, in_pieces=in_pieces)

    def _may_be_captured(self) -> bool:
        job = self.job
        if job.why_no_graphs(offload=False):
            return False
        is_fused = job.machine.uses_triton and not execution.why_op_by_op(job.spec)
        flops = self.flops_of_a_layer(job.flops)
        if flops <= execution.LAUNCH_BOUND_FLOPS["fused" if is_fused else "op by op"]:
            return True
        return is_fused and job.config.adapter is not None and self.share_of_gaps(flops) >= execution.GAPS_MATTER

    def flops_of_a_layer(self, flops: float) -> float:
        """FLOPs of a layer in a micro-batch, of `flops` for a token of the model."""
        return flops * self.rows * self.job.row_tokens / max(1, len(self.job.spec.layers))

    def share_of_gaps(self, flops: float) -> float:
        """What share of a layer's work the gaps between its kernels are; `flops`: of the layer in a micro-batch."""
        known, precision = self.job.speed, self.job.machine.precision
        rates = known.device.rates
        rate = known.efficiencies.matmul * rates.get(precision, rates["fp32"])
        if self.job.config.model.quantization == "fp8":
            rate *= execution.FP8_SPEED
        return execution.GAP_SECONDS * rate / max(1.0, flops)

    def candidate(self, ladder: Ladder) -> "Candidate":
        """Returns what this micro-batch takes with `ladder`, in tiles where they lower the peak."""
        if self.job.given is None:
            ladder = ladder.tiled(self.job.spec, self.micro)
        spec = self.job.spec
        host = ladder.host_bytes(spec, self.micro) if ladder.offload else 0
        device, after = ladder.device_bytes(spec, self.micro), ladder.bytes_after_forward(spec, self.micro)
        return self._made(Weighed(ladder, device, host, after))

    def _made(self, held: Weighed) -> "Candidate":
        besides = self._besides[held.ladder.layers == "fused"]
        memory = besides.with_activations(held.device, beside_head=self._beside_head(held))
        return Candidate(self, held.ladder, memory, held.host)

    def _beside_head(self, held: Weighed) -> int | None:
        """What `Memory.with_activations` is told: a frozen head leaves nothing behind.

        Nor does a trained one but its gradient, and while it runs no layer's gradient is there, if they arrive. Then
        the backward's end is a third moment; adapters' gradients are laid side by side there, in a tensor of their own.
        """
        memory = self._besides[held.ladder.layers == "fused"]
        if self.job.config.adapter is not None:
            # DoRA's lengths of rows, in the last layer's forward, are one more moment, without what the head needs.
            before = held.after_forward + max(0, self._lengths_bytes - memory.logits) - memory.backward_buffers
            if not self.micro.gradient_bytes:
                return before
            return max(before - memory.gradients, memory.gradients - memory.logits)
        shares_by_layer = self.job.spread.strategy == "fsdp2"
        if not self.micro.gradient_bytes and not shares_by_layer:
            return None
        with_head = held.after_forward + trained_head_bytes(self.job.spec, self.micro)
        with_head -= memory.gradients if self.micro.gradient_bytes else 0
        if shares_by_layer:
            return max(with_head, memory.last_buffers) - memory.backward_buffers - memory.logits
        return max(with_head, last_gradient_bytes(self.job.spec, self.micro)) - memory.logits

    def best(self) -> "Candidate":
        """Returns the candidate that computes least again of those that fit, or else the nearest to fitting.

        Where q, k and v wait on the host, the faster of it and the first without: their copies may take longer than
        making them again.
        """
        if self.job.given is not None:
            return self.candidate(self.job.given)
        each = ladder.profile(self.job.spec, self.micro, **self.job.settings)
        # No rung helps where all else alone does not fit.
        allowed = self.job.machine.device.memory_bytes
        if min(one.total for one in self._besides.values()) > allowed:
            return self._made(next(each.last()))
        # The head's logits may be gone by then.
        room = max(allowed - one.total + one.logits for one in self._besides.values())
        fitting = (held for held in each.within(room) if self._lack(held) <= (False, allowed))
        found = next(fitting, None)
        if found is None:
            return self._made(min(each, key=self._lack))
        made = self._made(found)
        if not _sends_heads(found.ladder):
            return made
        without = next((self._made(held) for held in fitting if not _sends_heads(held.ladder)), made)
        return without if without.seconds < made.seconds else made

    def _lack(self, held: Weighed) -> tuple[bool, int]:
        """Returns whether the host lacks memory for a ladder, and the bytes that it takes on the device."""
        besides = self._besides[held.ladder.layers == "fused"]
        on_host = held.host + self._besides[False].states_on_host
        total = besides.total_with(held.device, beside_head=self._beside_head(held))
        return on_host > self.job.machine.host_bytes, total


def _sends_heads(ladder: Ladder) -> bool:
    """Whether q, k and v of some layer wait on the host."""
    return ladder.offload and "mixer" in ladder.keep


@dataclass(frozen=True)
class Candidate:
    """A micro-batch with a ladder; `host_bytes`: pinned memory of the host. It is what `speed.step` takes."""

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
        on_host = self.host_bytes + self.memory.states_on_host
        return self.memory.total <= machine.device.memory_bytes and on_host <= machine.host_bytes

    def gathered(self) -> "Candidate":
        """Returns the same with layers that stay gathered from their forward to their backward."""
        job = self.size.job
        stays = replace(job, given=self.ladder, spread=replace(job.spread, reshards=False))
        return Size(stays, self.rows).candidate(self.ladder)

    @cached_property
    def with_transposed(self) -> Memory | None:
        """The memory with fp8 weights kept transposed too; None without fp8."""
        job = self.size.job
        if job.config.model.quantization != "fp8":
            return None
        return self.memory.with_transposed(transposed_bytes(job.spec))

    @property
    def keep_transposed(self) -> bool | None:
        """Whether there is memory for that; None without fp8."""
        memory = self.with_transposed
        return None if memory is None else memory.total <= self.size.job.machine.device.memory_bytes

    @cached_property
    def with_head(self) -> Memory | None:
        """The memory with the head in fp8 as well; None where it cannot be, or not without copies of other weights."""
        job = self.size.job
        if not self.keep_transposed or execution.why_no_fp8_head(job.spec, job.machine.device, job.spread):
            return None
        return self.memory.with_transposed(transposed_bytes(job.spec) + rounded_head_bytes(job.spec))

    @property
    def head_in_fp8(self) -> bool | None:
        """Whether there is memory for that; None without fp8."""
        if self.with_transposed is None:
            return None
        return self.with_head is not None and self.with_head.total <= self.size.job.machine.device.memory_bytes

    @property
    def with_copies(self) -> Memory:
        """The memory with the copies for fp8 products that it has room for."""
        found = self.with_head if self.head_in_fp8 else self.with_transposed if self.keep_transposed else self.memory
        assert found is not None
        return found

    @cached_property
    def why_no_graphs(self) -> str:
        """Why micro-batches are not captured, where nothing else is asked for; "" where they are."""
        job = self.size.job
        if job.spread.strategy != "single":
            why = f"graphs are for single: {job.spread.name} launches kernel by kernel"
            return why if job.spread.num_processes == 1 else "graphs are for one process"
        hindrance = job.why_no_graphs(offload=self.ladder.offload)
        if hindrance:
            return hindrance
        flops = self.size.flops_of_a_layer(job.flops_with(self.ladder))
        if flops <= execution.LAUNCH_BOUND_FLOPS[self.ladder.layers]:
            return ""
        # Weights that are all trained have gradients of their own, which a graph would hold from step to step.
        can_gain = self.ladder.layers == "fused" and self.kernels == "triton" and job.config.adapter is not None
        if not can_gain or self.size.share_of_gaps(flops) < execution.GAPS_MATTER:
            return "the GPU works longer than launching takes"
        if self._with_pool > job.machine.device.memory_bytes:
            return "the gain is small, and a graph's memory beside that of rows of another shape is not there"
        return ""

    @property
    def _with_pool(self) -> int:
        """Bytes with graphs: their pool keeps what a micro-batch needed, also while one of another shape runs."""
        memory = self.with_copies
        return memory.total + memory.activations + memory.logits

    @cached_property
    def seconds(self) -> float:
        """Of a step on full rows."""
        job = self.size.job
        rows = speed.Rows(job.row_tokens, job.spread.sharing * job.row_tokens)
        known = job.speed
        return speed.step(job.config, job.spec, self, known.device, rows=rows, efficiencies=known.efficiencies).seconds

    @property
    def device(self) -> str:
        """The kind of device."""
        return self.size.job.machine.device.kind

    @property
    def precision(self) -> str:
        """Of the products."""
        return self.size.job.machine.precision

    @property
    def quantization(self) -> str:
        """Of the frozen base."""
        return self.size.job.config.model.quantization

    @property
    def kernels(self) -> str:
        """Which implementation runs."""
        return "triton" if self.size.job.machine.uses_triton else "reference"

    @property
    def layers(self) -> str:
        """How they run."""
        return self.ladder.layers

    @property
    def keep(self) -> tuple[Keep, ...]:
        """What each layer keeps."""
        return self.ladder.keep

    @property
    def micro_batch_size(self) -> int:
        """Its rows."""
        return self.rows

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step."""
        return self.size.job.config.train.batch_size // self.rows

    @property
    def cuda_graphs(self) -> bool:
        """Whether micro-batches are captured."""
        asked = self.size.job.config.engine.cuda_graphs
        return asked is True or (asked == "auto" and not self.why_no_graphs)

    @property
    def num_trained_parameters(self) -> int:
        """How many are trained."""
        return self.size.job.counts[0]

    @property
    def spread(self) -> Spread:
        """Over which devices."""
        return self.size.job.spread
