"""Seconds of a training step: a roofline whose efficiencies were measured, from an architecture's FLOPs and bytes.

Each part of a step takes the longer of its arithmetic at the rate that products reach and its traffic at the bandwidth
that kernels reach (Williams et al. 2009). Parts run one after another; what launches and copies to the host take is
hidden behind them, or is what the step waits for. Which constants are measured and which are rules of thumb stands
beside each of them, in `Efficiencies`.
"""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

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
    PlainSpec,
    SideBySideSpec,
)
from stoker.config.schema import RunConfig
from stoker.plan import facts
from stoker.plan.adapter import targeted
from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.memory import VALUE_BYTES, frozen_weight_bytes, optimizer_bytes
from stoker.plan.plan import Plan


@dataclass(frozen=True)
class Efficiencies:
    """Shares of a device's figures that a step reaches, and fixed costs; `source` says whose they are.

    The defaults are one H200's under its 700 W limit (torch 2.11; docs/engine_log.md). For other devices every one of
    them is a rule of thumb until it is measured there.
    """

    matmul: float = 0.69
    """Of the dense rate, by bf16 products inside a step: 655 to 685 of 989 TFLOP/s. Measured in cell A."""
    matmul_fp8: float = 0.60
    """The same of the fp8 rate. Rule of thumb: alone, products reach 0.72; a step heats the card."""
    attention: float = 0.43
    """Of the dense rate, by attention with heads of 128 channels, forward and backward. Measured in cell A."""
    attention_head: float = 0.56
    """Attention's rate grows with head_dim to this power, up to 128: heads of 64 reach 0.29. Measured in cell E."""
    bandwidth: float = 0.80
    """Of the memory's bandwidth, by elementwise kernels: 92% of a copy's, which reaches 87%. Measured in cell A."""
    scan: float = 0.15
    """Of the fp32 rate, by state spaces' scans. Rule of thumb."""
    adapter_passes: float = 5.5
    """Reads or writes of each value that goes into and comes out of an adapted layer. Measured in A, checked in E."""
    op_by_op: float = 1.5
    """Elementwise traffic of a layer under autograd, over that of the fused one. Rule of thumb."""
    layer_launch_seconds: float = 0.6e-3
    """Launching a fused layer's forward and backward. Measured in cell G: 9.5 ms for 16 layers."""
    op_by_op_launch_seconds: float = 1.5e-3
    """The same of a layer that runs op by op. Rule of thumb: two to three times as many kernels."""
    host_link: float = 0.80
    """Of the link to the host, by copies of pinned memory. Rule of thumb."""
    start_seconds: float = 16.0
    """Before the first step at full speed: imports, compilation of kernels, the first step. Measured in A (16 s)."""
    load_bandwidth: float = 3.0e9
    """Bytes a second of weights read and moved to the device. Measured between cells A and E."""
    source: str = "an H200's, measured; rules of thumb on other devices"


MEASURED = Efficiencies()
"""What was measured, used until a machine has its own."""

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

    `waiting` is the time that launches or copies take beyond the work that hides them.
    """

    matmul: float = 0.0
    recompute: float = 0.0
    attention: float = 0.0
    adapters: float = 0.0
    elementwise: float = 0.0
    head: float = 0.0
    dequantise: float = 0.0
    optimizer: float = 0.0
    waiting: float = 0.0
    hidden: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Returns seconds by part."""
        values: dict[str, Any] = asdict(self)
        del values["hidden"]
        return values


def step(
    config: RunConfig,
    spec: AnySpec,
    plan: Plan,
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
        self, config: RunConfig, spec: AnySpec, plan: Plan, device: CatalogueDevice, *, rows: Rows, found: Efficiencies
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
        launches = 0.0 if self.plan.cuda_graphs or self.plan.device == "cpu" else self._launches()
        work = sum(times.values())
        waiting = max(0.0, copies - work, launches - work)
        micro = self.plan.accumulation_steps
        return Step(
            **{name: micro * seconds for name, seconds in times.items()},
            optimizer=self._optimizer(),
            waiting=micro * waiting,
            hidden={"copies to the host": micro * copies, "launches": micro * launches},
        )

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
        factor = (1.0 if is_fused else self.found.op_by_op) * (1.0 + _AGAIN[rung])
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
        return self.plan.num_trained_parameters * moved / self.bandwidth


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
