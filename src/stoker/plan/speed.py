"""Seconds of a training step: a roofline whose efficiencies were measured, from an architecture's FLOPs and bytes.

Each part of a step takes the longer of its arithmetic at the rate that products reach and its traffic at the bandwidth
that kernels reach (Williams et al. 2009). Parts run one after another; what launches and copies to the host take is
hidden behind them, or is what the step waits for. Which constants are measured and which are rules of thumb stands
beside each of them, in `efficiencies`.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Protocol

from stoker.arch import activations, arithmetic
from stoker.arch.activations import Keep
from stoker.arch.borrowed import AnySpec, BorrowedMixer
from stoker.arch.parts import parts
from stoker.arch.shape import why_not_llama
from stoker.arch.spec import (
    AttentionSpec,
    ExpertsSpec,
    GatedSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba2Spec,
    PlainSpec,
    SideBySideSpec,
)
from stoker.config.schema import RunConfig
from stoker.plan import facts
from stoker.plan.adapter import targeted
from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.efficiencies import MEASURED, Efficiencies
from stoker.plan.links import Links
from stoker.plan.memory import VALUE_BYTES, frozen_weight_bytes, optimizer_bytes
from stoker.plan.spread import Spread, volume

# Values a token that elementwise work reads or writes, forward and backward: see `_elementwise_values`.
_NORM_AND_RESIDUAL = 9
_GATED, _PLAIN, _ROTATION = 9, 5, 4
_LOGIT_BYTES = 8  # of the loss: logits written, read twice as bf16 and rewritten as their gradient
# Share of the elementwise traffic that a rung runs again: norms; norms, rotation and the first residual.
_AGAIN: dict[Keep, float] = {"all": 0.0, "mixer": 0.1, "attention": 0.3, "input": 0.3}
# Bytes a weight that turning a quantised one into the compute type moves: it is read, and two bytes are written.
_DEQUANTISED = {"nf4": 0.52 + 2, "int8": 3.0}
# Of an optimiser step, bytes a trained parameter besides its state: gradient read twice (norm, update) and zeroed,
# weight read and written in fp32, and its copy in the compute type.
_UPDATE_BYTES = 3 * 4 + 2 * 4 + 2


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
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Returns seconds by part."""
        return {name: value for name, value in vars(self).items() if name != "hidden"}


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


class _Clock:
    """Adds up a step."""

    def __init__(
        self, config: RunConfig, spec: AnySpec, plan: _Way, device: CatalogueDevice, *, rows: Rows, found: Efficiencies
    ) -> None:
        self.config, self.spec, self.plan, self.device, self.rows, self.found = config, spec, plan, device, rows, found
        self.value_bytes = VALUE_BYTES[plan.precision]
        self.tokens = plan.micro_batch_size * rows.tokens
        self.is_frozen = config.adapter is not None
        dtype = plan.precision
        if dtype == "fp32" and config.engine.tf32 and "tf32" in device.rates:
            dtype = "tf32"
        self.peak = device.rates.get(dtype, device.rates["fp32"])
        self.bandwidth = found.bandwidth * device.bandwidth
        self.adapted = 0.0
        if config.adapter is not None:
            self.adapted = len(targeted(spec, config.adapter.targets)) / max(1, len(facts.linear_shapes(spec)))

    def step(self) -> Step:
        """Returns all parts, of all micro-batches and the update."""
        times: defaultdict[str, float] = defaultdict(float)
        for (layer, rung), count in self._layers().items():
            for name, seconds in self._layer(layer, rung).items():
                times[name] += count * seconds
        times["head"] += self._head()
        copies = 2 * self.plan.host_bytes / (self.found.host_link * self.device.host_link or 1.0)
        launches = 0.0 if self.plan.cuda_graphs else self._launches()
        work = sum(times.values())
        # A CPU makes its calls and does their work one after the other.
        waiting = launches if self.plan.device == "cpu" else max(0.0, copies - work, launches - work)
        micro = self.plan.accumulation_steps
        collectives, exposed = self._communication(work)
        return Step(
            **{name: micro * seconds for name, seconds in times.items()},
            optimizer=self._optimizer(),
            communication=exposed,
            waiting=micro * waiting,
            hidden={
                "copies to the host": micro * copies,
                "launches": micro * launches,
                "collectives": collectives - exposed,
            },
        )

    def _communication(self, work: float) -> tuple[float, float]:
        """Seconds of a step's collectives, and those of them that nothing hides; `work`: seconds of a micro-batch.

        Those of a layer run beside the work of its neighbours, all but the first of them. DDP's and ZeRO-1's sums run
        beside the last micro-batch's backward; what gathers new weights after the update runs beside nothing.
        """
        spread, micro = self.plan.spread, self.plan.accumulation_steps
        if spread.num_processes == 1:
            return 0.0, 0.0
        trained, depth = self.plan.num_trained_parameters, max(1, len(self.spec.layers))
        gradients = stored = (2.0 if self.config.train.weight_dtype == "bf16" and not self.is_frozen else 4.0) * trained
        if self.is_frozen:
            stored += frozen_weight_bytes(self.spec, self.plan.quantization, self.value_bytes)
        moved = volume(spread, stored=stored, gradients=gradients)
        links = Links.of(self.device)
        in_micro = links.seconds(moved.micro_gathered, spread, collectives=2 * depth)
        in_micro += links.seconds(moved.micro_summed, spread, collectives=depth)
        summed = links.seconds(moved.step_summed, spread, collectives=depth)
        summed += links.seconds(moved.step_all_summed, spread, collectives=depth, passes=2)
        after = links.seconds(moved.step_gathered, spread)
        backward = (1 / 2 if self.is_frozen else 2 / 3) * work
        exposed = micro * max(in_micro / depth, in_micro - self.found.overlap * work)
        exposed += max(summed / depth, summed - self.found.overlap * backward) + after
        return micro * in_micro + summed + after, exposed

    def _layers(self) -> Counter[tuple[LayerSpec, Keep]]:
        known: dict[tuple[int, Keep], tuple[LayerSpec, Keep]] = {}  # most layers are one object: hash each once
        counts: Counter[tuple[int, Keep]] = Counter()
        for layer, rung in zip(self.spec.layers, self.plan.keep, strict=True):
            counts[id(layer), rung] += 1
            known[id(layer), rung] = (layer, rung)
        total: Counter[tuple[LayerSpec, Keep]] = Counter()
        for key, count in counts.items():
            total[known[key]] += count
        return total

    def _layer(self, layer: LayerSpec, rung: Keep) -> dict[str, float]:
        """Seconds of one layer in a micro-batch."""
        hidden_size = self.spec.hidden_size
        is_fused = self.plan.layers == "fused" and not why_not_llama(layer)
        again = activations.run_again(layer, hidden_size, rung, is_fused=is_fused)
        linears = arithmetic.linears(layer, hidden_size)
        fp8 = self.plan.quantization == "fp8" and self.device.fp8
        passes = 2 if self.is_frozen else 3
        times: defaultdict[str, float] = defaultdict(float)
        inputs_outputs = 0.0
        for name, linear in linears.items():
            rows, into, out = self.tokens * linear.used, linear.in_features, sum(linear.out_features)
            weights = linear.weights * max(1, linear.experts)
            one = self._product(rows, into, out, weights, fp8=fp8 and not linear.experts)
            times["matmul"] += passes * one
            times["recompute"] += one * (name in again)
            values = rows * (into + out)
            inputs_outputs += values
            times["dequantise"] += self._dequantise(weights, 2 + (name in again), values)
        for name, part in parts(layer, hidden_size).items():
            forward = (
                self.tokens * part.flops(max(1, round(self.rows.document_tokens))) / self._mixing_rate(layer, name)
            )
            times["attention"] += 3 * forward
            times["recompute"] += forward * (name in again)
        passes_of_adapter = self.found.adapter_passes * self.adapted
        times["adapters"] += passes_of_adapter * inputs_outputs * self.value_bytes / self.bandwidth
        moved = self.tokens * _elementwise_values(layer, hidden_size) * self.value_bytes
        # On plain PyTorch a fused layer has the kernels of one that runs op by op.
        factor = (1.0 if is_fused and self.plan.kernels == "triton" else self.found.op_by_op) * (1.0 + _AGAIN[rung])
        times["elementwise"] += factor * moved / self.bandwidth
        return dict(times)

    def _product(self, rows: float, into: int, out: int, weights: int, *, fp8: bool) -> float:
        """Seconds of one product: its arithmetic, or the bytes of its three matrices."""
        rate = self.found.matmul_fp8 * self.device.rates["fp8"] if fp8 else self.found.matmul * self.peak
        moved = (weights + rows * (into + out)) * self.value_bytes
        return max(2 * rows * into * out / rate, moved / self.bandwidth)

    def _dequantise(self, weights: int, times: int, values: float) -> float:
        kind = self.plan.quantization
        if kind == "fp8":  # rows are read and written in fp8 on their way in; weights transposed where no copy is kept
            transposed = 0 if self.plan.keep_transposed else 2 * weights
            return (3 * values + transposed) / self.bandwidth
        return times * _DEQUANTISED.get(kind, 0.0) * weights / self.bandwidth

    def _mixing_rate(self, layer: LayerSpec, name: str) -> float:
        """FLOP/s of what a mixer computes beside its linear layers, or of a router."""
        mixer = layer.mixer
        if name == "feed_forward":
            return self.found.matmul * self.peak
        if isinstance(mixer, SideBySideSpec):
            mixer = mixer.attention
        if isinstance(mixer, AttentionSpec):
            head_dim = mixer.head_dim
        elif isinstance(mixer, LatentAttentionSpec):
            head_dim = mixer.nope_dim + mixer.rope.dim
        elif isinstance(mixer, BorrowedMixer):
            head_dim = 64
        elif isinstance(mixer, Mamba2Spec):
            return self.found.chunked_scan * self.peak
        else:
            return self.found.scan * self.device.rates["fp32"]
        return self.found.attention * min(1.0, head_dim / 128) ** self.found.attention_head * self.peak

    def _head(self) -> float:
        """Seconds of the head and the loss over the trained tokens; only a trained head has a weight gradient."""
        tokens, vocabulary = self.tokens * self.rows.trained_share, self.spec.vocab_size
        products = (2 if self.is_frozen else 3) * self._product(
            tokens, self.spec.hidden_size, vocabulary, vocabulary * self.spec.hidden_size, fp8=False
        )
        return products + _LOGIT_BYTES * tokens * vocabulary / self.bandwidth

    def _launches(self) -> float:
        fused = sum(self.plan.layers == "fused" and not why_not_llama(layer) for layer in self.spec.layers)
        others = len(self.spec.layers) - fused
        return fused * self.found.layer_launch_seconds + others * self.found.op_by_op_launch_seconds

    def _optimizer(self) -> float:
        moved = _UPDATE_BYTES + 2 * optimizer_bytes(self.config.train.optimizer)
        return self.plan.num_trained_parameters * moved / self.bandwidth / self.plan.spread.optimizer_shards


def _elementwise_values(layer: LayerSpec, hidden_size: int) -> float:
    """Values a token that norms, residuals, rotation and activations read or write, forward and backward.

    A norm reads and writes a row forward and four backward, a residual sum moves three: nine for each part. A rotation
    turns q and k twice, in place. A gate reads two and writes one; its backward reads three and writes three.
    """
    total = float(_NORM_AND_RESIDUAL * hidden_size * len(parts(layer, hidden_size)))
    mixer, feed_forward = layer.mixer, layer.feed_forward
    attention = mixer.attention if isinstance(mixer, SideBySideSpec) else mixer
    if isinstance(attention, AttentionSpec):
        turned = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        total += (_ROTATION + (6 if attention.qk_norm else 0)) * turned
    elif isinstance(attention, BorrowedMixer):
        total += 2 * attention.saved_values
    elif attention is not None:
        total += 2 * parts(layer, hidden_size)[layer.mixer_name].widest
    if isinstance(feed_forward, GatedSpec):
        total += _GATED * feed_forward.intermediate_size
    elif isinstance(feed_forward, PlainSpec):
        total += _PLAIN * feed_forward.intermediate_size
    elif isinstance(feed_forward, ExpertsSpec):
        # Rows are gathered for their experts and scattered back, forward and backward.
        total += feed_forward.top_k * (_GATED * feed_forward.intermediate_size + 8 * hidden_size)
        total += _GATED * feed_forward.shared_size
    return total
