"""Seconds of a training step: a roofline whose efficiencies were measured, from an architecture's FLOPs and bytes.

Each part of a step takes the longer of its arithmetic at the rate that products reach and its traffic at the bandwidth
that kernels reach (Williams et al. 2009). Parts run one after another; what launches and copies to the host take is
hidden behind them, or is what the step waits for. Which constants are measured and which are rules of thumb stands
beside each of them, in `efficiencies`.
"""

from collections import defaultdict
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Protocol

from stoker.arch.activations import Keep
from stoker.arch.borrowed import AnySpec
from stoker.arch.saved import Adapted
from stoker.config.schema import RunConfig
from stoker.plan import cpu, facts, shared_rows
from stoker.plan.adapter import adapted, num_targeted
from stoker.plan.amounts import BYTES_MADE_DENSE, Amounts, Mixing, Product, Way, amounts, reads_lengths_once
from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.efficiencies import MEASURED, Efficiencies
from stoker.plan.gathered import Sizes, passing
from stoker.plan.links import Links
from stoker.plan.memory import VALUE_BYTES, frozen_weight_bytes
from stoker.plan.spread import Spread
from stoker.plan.states import bytes_each

_LOGIT_BYTES = 8  # of the loss: logits written, read twice as bf16 and rewritten as their gradient
# Of an optimiser step, bytes a trained parameter besides its state: gradient read twice (norm, update) and zeroed,
# weight read and written in fp32, and its copy in the compute type.
_UPDATE_BYTES = 3 * 4 + 2 * 4 + 2
# Of the length of a weight's rows in plain PyTorch, bytes that an fp32 value of it moves: read, its square written and
# read.
_LENGTH_BYTES = 3 * 4


@dataclass(frozen=True)
class Rows:
    """What rows hold, on average: `tokens` of a row that go through the model (padding included), of which
    `trained_share` are learned, in documents whose length as attention feels it is `document_tokens`.
    """

    tokens: float
    document_tokens: float
    trained_share: float = 1.0


@dataclass(frozen=True)
class Step:
    """Seconds of an optimiser step by what takes them; `hidden`: copies and launches that wait for nothing.

    `communication` is the time that devices wait for one another's weights and gradients, `waiting` that which launches
    or copies to the host take beyond the work that hides them.
    """

    matmul: float = 0.0
    recompute: float = 0.0
    attention: float = 0.0
    adapters: float = 0.0
    elementwise: float = 0.0
    head: float = 0.0
    dequantise: float = 0.0
    optimizer: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0
    hidden: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self._seconds

    @cached_property
    def _seconds(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Returns seconds by part."""
        return {name: getattr(self, name) for name in PARTS}


PARTS = tuple(one.name for one in fields(Step) if one.name != "hidden")


class _Way(Protocol):
    """How a step runs, of which a `Plan` is one; its fields mean what they mean there."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def keep_transposed(self) -> bool | None: ...
    @property
    def head_in_fp8(self) -> bool | None: ...
    @property
    def kernels(self) -> str: ...
    @property
    def layers(self) -> str: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def accumulation_steps(self) -> int: ...
    @property
    def keep(self) -> tuple[Keep, ...]: ...
    @property
    def cuda_graphs(self) -> bool: ...
    @property
    def num_trained_parameters(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def spread(self) -> Spread: ...


def step(
    config: RunConfig,
    spec: AnySpec,
    plan: _Way,
    device: CatalogueDevice,
    *,
    rows: Rows,
    efficiencies: Efficiencies = MEASURED,
) -> Step:
    """Returns the seconds of one optimiser step of `plan` on `device`, by part."""
    return _Clock(config, spec, plan, device, rows=rows, found=efficiencies).step()


def start_seconds(spec: AnySpec, efficiencies: Efficiencies = MEASURED) -> float:
    """Returns the seconds before a run is at full speed: imports, loading bf16 weights, compilation."""
    stored = frozen_weight_bytes(spec, "none", 2)
    return efficiencies.start_seconds + stored / efficiencies.load_bandwidth


def sizes_of(config: RunConfig, spec: AnySpec, plan: _Way) -> Sizes:
    """Returns the sizes of a plan's weights."""
    is_full, value_bytes = config.adapter is None, VALUE_BYTES[plan.precision]
    return Sizes(
        base=0 if is_full else frozen_weight_bytes(spec, plan.quantization, value_bytes),
        trained=plan.num_trained_parameters,
        is_full=is_full,
        weight_bytes=2 if is_full and config.train.weight_dtype == "bf16" else 4,
        value_bytes=value_bytes,
    )


class _Clock:
    """Adds up a step."""

    def __init__(
        self, config: RunConfig, spec: AnySpec, plan: _Way, device: CatalogueDevice, *, rows: Rows, found: Efficiencies
    ) -> None:
        self.config, self.spec, self.plan, self.device, self.found = config, spec, plan, device, found
        self.value_bytes = VALUE_BYTES[plan.precision]
        self.is_frozen = config.adapter is not None
        dtype = plan.precision
        if dtype == "fp32" and config.engine.tf32 and "tf32" in device.rates:
            dtype = "tf32"
        self.peak = device.rates.get(dtype, device.rates["fp32"])
        self.bandwidth = found.bandwidth * device.bandwidth
        way = Way(
            plan.layers,
            plan.keep,
            plan.quantization,
            plan.keep_transposed,
            self.is_frozen,
            plan.kernels == "triton",
            _with_dora(config, spec),
            plan.head_in_fp8 is True,
        )
        self.tokens, self.document_tokens = plan.micro_batch_size * rows.tokens, rows.document_tokens
        self.amounts = amounts(spec, way, self.tokens, rows.document_tokens, rows.trained_share)

    def step(self) -> Step:
        """Returns all parts, of all micro-batches and the update."""
        on_cpu = self.plan.device == "cpu"
        times = self._micro_batch_on_cpu() if on_cpu else self._micro_batch(self.amounts)
        copies = self.plan.host_bytes / (self.found.host_link * self.device.host_link or 1.0)  # each way
        # A CPU makes its calls and does their work one after the other: they are in the micro-batch's times.
        launches = 0.0 if self.plan.cuda_graphs or on_cpu else self._launches()
        calls = times.pop("waiting", 0.0)
        work = sum(times.values())
        waiting = calls if on_cpu else max(self._waiting_for_copies(copies, times), launches - work)
        micro = self.plan.accumulation_steps
        collectives, exposed = self._communication(work)
        return Step(
            **{name: micro * seconds for name, seconds in times.items()},
            optimizer=self._optimizer(),
            communication=exposed,
            waiting=micro * waiting + (cpu.step_seconds(self.found.cpu) if on_cpu else 0.0),
            hidden={
                "copies to the host": micro * 2 * copies,
                "launches": micro * launches,
                "collectives": collectives - exposed,
            },
        )

    def _waiting_for_copies(self, copies: float, times: dict[str, float]) -> float:
        """Seconds that layers wait for copies of so many seconds each way; `times`: of a micro-batch, by part.

        What leaves does so beside the layers' forward, and comes back beside their backward.
        """
        products = 2 if self.is_frozen else 3
        forward = times["matmul"] / products + (times["attention"] + times["elementwise"] + times["adapters"]) / 3
        backward = sum(times.values()) - times["head"] - forward
        return max(0.0, copies - forward) + max(0.0, copies - backward)

    def _micro_batch(self, work: Amounts) -> dict[str, float]:
        """Seconds of a micro-batch, by part."""
        times: defaultdict[str, float] = defaultdict(float)
        for product in work.products:
            one = self._product(product)
            times["matmul"] += product.times * one
            times["recompute"] += product.again * one
        for mixing in work.mixing:
            forward = mixing.flops / self._mixing_rate(mixing)
            times["attention"] += mixing.times * forward
            times["recompute"] += mixing.again * forward
        passes = self.found.adapter_passes * work.adapter_values
        passes += self.found.adapter_passes_grouped * work.routed_adapter_values
        adapted = _adapted_share(self.config, self.spec)
        times["adapters"] = adapted * passes * self.value_bytes / self.bandwidth + self._dora(work)
        moved = work.fused_values + self.found.op_by_op * work.op_by_op_values
        times["elementwise"] = moved * self.value_bytes / self.bandwidth
        times["dequantise"] = work.dequantised_bytes / self.bandwidth
        times["head"] = self._head(work.head)
        return times

    def _dora(self, work: Amounts) -> float:
        """Seconds of the lengths of rows of weights with their updates, and of the factors that they lead to.

        Triton reads a weight once; plain PyTorch widens a piece to fp32, squares and sums it, and multiplies it by an
        adapter's A. A quantised one is turned into two bytes first.
        """
        adapter, weights = self.config.adapter, work.measured_weights
        if adapter is None or not weights:
            return 0.0
        is_wide = self.value_bytes == 4  # a narrow weight is multiplied on tensor cores, faster than it is read
        product = 2.0 * adapter.rank * weights / (self.found.matmul * self.device.rates["fp32"])
        if reads_lengths_once(adapter.rank, uses_triton=self.plan.kernels == "triton"):
            lengths = max(self.value_bytes * weights / self.bandwidth, product if is_wide else 0.0)
        else:
            widened = 0 if is_wide else self.value_bytes + 4
            lengths = (widened + _LENGTH_BYTES) * weights / self.bandwidth
            lengths += max(product, 4 * weights / self.bandwidth)
        lengths += BYTES_MADE_DENSE.get(self.plan.quantization, 0.0) * weights / self.bandwidth
        return lengths + work.factor_values * self.value_bytes / self.bandwidth

    def _communication(self, work: float) -> tuple[float, float]:
        """Seconds of a step's collectives, and those of them that nothing hides; `work`: seconds of a micro-batch.

        Those of a layer run beside the work of its neighbours, all but the first of them. DDP's and ZeRO-1's sums run
        beside the last micro-batch's backward; what gathers new weights after the update runs beside nothing, and so
        do exchanges of shared rows.
        """
        spread, micro = self.plan.spread, self.plan.accumulation_steps
        if spread.num_processes == 1 and not spread.on_host and not spread.copies_weights:
            return 0.0, 0.0
        depth = max(1, len(self.spec.layers))
        sizes = sizes_of(self.config, self.spec, self.plan)
        stored = sizes.base + sizes.trained_bytes
        moved = passing(self.spec, spread, sizes)
        links = Links.of(self.device)
        in_micro = links.seconds(moved.micro_gathered, spread, collectives=spread.gathers * depth)
        in_micro += links.seconds(moved.micro_summed, spread, collectives=depth)
        if "weights" in spread.on_host:  # each gathering begins with this device's part, from the host
            in_micro += spread.gathers * stored / spread.weight_shards / self._host_link()
        summed = links.seconds(moved.step_summed, spread, collectives=depth)
        summed += links.seconds(moved.step_all_summed, spread, collectives=depth, passes=2)
        after = links.seconds(moved.step_gathered, spread)
        backward = (1 / 2 if self.is_frozen else 2 / 3) * work
        exposed = micro * max(in_micro / depth, in_micro - self.found.overlap * work)
        exposed += max(summed / depth, summed - self.found.overlap * backward) + after
        waited = micro * self._exchange(links)
        if spread.copies_weights:  # read and written where they lie, between layers' work
            waited += micro * 2 * moved.micro_gathered / self.bandwidth
        return micro * in_micro + summed + after + waited, exposed + waited

    def _exchange(self, links: Links) -> float:
        """Seconds for which the devices that share rows exchange heads in a micro-batch: every layer waits for them."""
        size = self.plan.spread.sharing
        if size == 1:
            return 0.0
        is_fused = self.plan.layers == "fused"
        values = self.tokens * shared_rows.sent_values(self.spec, self.plan.keep, size, is_fused=is_fused)
        return links.exchange_seconds(values * self.value_bytes, self.plan.spread, exchanges=4 * len(self.spec.layers))

    def _micro_batch_on_cpu(self) -> dict[str, float]:
        """Seconds of a micro-batch on a CPU, by part, its calls among them."""
        adapter = self.config.adapter
        return cpu.micro_batch_seconds(
            self.amounts,
            self.found.cpu,
            rate=self.found.matmul * self.peak,
            attention=self.found.attention * self.peak,
            head_power=self.found.attention_head,
            value_bytes=self.value_bytes,
            hidden_size=self.spec.hidden_size,
            tokens=self.tokens,
            document_tokens=self.document_tokens,
            is_packed=self.config.data.packing,
            rank=None if adapter is None else adapter.rank,
            adapted=_adapted_share(self.config, self.spec),
        )

    def _product(self, one: Product) -> float:
        """Seconds of one product: its arithmetic, or the bytes of its three matrices."""
        in_fp8 = one.in_fp8 and self.device.fp8
        rate = self.found.matmul * self.peak
        if in_fp8:
            rate = self.found.matmul_fp8 * self.device.rates["fp8"]
        elif one.is_grouped:
            rate = self.found.matmul_grouped * self.peak
        return max(one.flops / rate, one.values * self.value_bytes / self.bandwidth)

    def _mixing_rate(self, one: Mixing) -> float:
        """FLOP/s of what a mixer computes beside its linear layers, or of a router."""
        match one.kind:
            case "products":
                return self.found.matmul * self.peak
            case "chunked_scan":
                return self.found.chunked_scan * self.peak
            case "scan":
                lanes = self.plan.micro_batch_size * one.width or self.found.scan_lanes
                return min(1.0, lanes / self.found.scan_lanes) * self.found.scan * self.device.rates["fp32"]
        length = self.amounts.document_tokens
        reached = length / (length + self.found.attention_half)
        if self.config.data.packing and self.plan.device == "cuda":
            reached *= self.found.attention_packed
        return reached * self.found.attention * min(1.0, one.width / 128) ** self.found.attention_head * self.peak

    def _head(self, head: Product) -> float:
        """Seconds of the head and the loss over the trained tokens; only a trained head has a weight gradient."""
        logits = _LOGIT_BYTES * head.rows * head.out / self.bandwidth
        return (2 if self.is_frozen else 3) * self._product(head) + logits

    def _launches(self) -> float:
        work = self.amounts
        fused = work.fused_layers * self.found.layer_launch_seconds
        layers = fused + work.op_by_op_layers * self.found.op_by_op_launch_seconds
        return layers + work.dora_calls * self.found.call_seconds

    def _optimizer(self) -> float:
        state = 2 * bytes_each(self.config.train.optimizer, self.config.adapter)
        moved = _UPDATE_BYTES + state
        if not self.is_frozen and self.plan.precision != "fp32":
            is_narrow = self.config.train.weight_dtype == "bf16"
            moved = self.found.update_bytes_narrow + state / 2 if is_narrow else self.found.update_bytes + state
        spread = self.plan.spread
        mine = self.plan.num_trained_parameters / spread.optimizer_shards
        if "optimizer" not in spread.on_host:
            return mine * moved / self.bandwidth
        # Gradients go to the host and weights come back, in fp32; the update is the host's, whose memory the processes
        # of a node share, and casts stay the device's. States on a disk are read and written in whole.
        sharing, there = min(spread.per_node, spread.num_processes), _UPDATE_BYTES + state
        seconds = mine * (2 * 4 / self._host_link() + sharing * there / self.found.host_bandwidth)
        seconds += mine * max(0.0, moved - there) / self.bandwidth
        if "optimizer" in spread.on_disk:
            seconds += mine * sharing * state / self.found.disk_bandwidth
        return seconds

    def _host_link(self) -> float:
        return self.found.host_link * self.device.host_link or self.found.host_bandwidth


def _with_dora(config: RunConfig, spec: AnySpec) -> Adapted | None:
    """Returns what DoRA keeps, of a run with DoRA."""
    adapter = config.adapter
    return adapted(spec, adapter, config.model.quantization) if adapter is not None and adapter.kind == "dora" else None


def _adapted_share(config: RunConfig, spec: AnySpec) -> float:
    """Returns the share of the linear layers that have an adapter."""
    if config.adapter is None:
        return 0.0
    return num_targeted(spec, config.adapter.targets) / max(1, len(facts.linear_shapes(spec)))
