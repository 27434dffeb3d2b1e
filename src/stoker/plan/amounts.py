"""What a micro-batch does, whatever the device: its products, its mixing, and the values that other work moves.

Counted once for a model, a micro-batch and a ladder: a survey asks for the same on each of its devices.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from stoker.arch import activations, arithmetic
from stoker.arch.activations import Keep
from stoker.arch.borrowed import AnySpec, BorrowedMixer
from stoker.arch.parts import Linear, parts
from stoker.arch.saved import Adapted
from stoker.arch.shape import why_not_llama
from stoker.arch.spec import (
    AttentionSpec,
    ExpertsSpec,
    GatedSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba1Spec,
    Mamba2Spec,
    PlainSpec,
    SideBySideSpec,
)
from stoker.plan.remember import remember

# Values a token that elementwise work reads or writes, forward and backward: see `_elementwise_values`.
_NORM_AND_RESIDUAL = 9
_GATED, _PLAIN, _ROTATION = 9, 5, 4
# Share of the elementwise traffic that a rung runs again: norms; norms, rotation and the first residual.
_AGAIN: dict[Keep, float] = {"all": 0.0, "mixer": 0.1, "attention": 0.3, "input": 0.3}
# Operations that PyTorch dispatches for a layer, forward and backward, by counting them: of Llama's, op by op, by the
# rungs of the layer kernel in plain PyTorch, and what an adapter on a linear layer adds to either.
_CALLS_OP_BY_OP, _ADAPTER_CALLS_OP_BY_OP, _ADAPTER_CALLS_FUSED = 175, 24.5, 32
_CALLS_FUSED: dict[Keep, int] = {"all": 190, "mixer": 202, "attention": 246, "input": 252}
# Running a layer that runs op by op again repeats its forward, about two fifths of its operations.
_CALLS_AGAIN = 0.4
BYTES_MADE_DENSE = {"nf4": 0.52 + 2, "int8": 3.0, "fp8": 3.0}
"""Bytes a weight that turning a quantised one into the compute type moves: it is read, two bytes are written."""
# DoRA's factor of each output: values an output that multiplying by it moves, forward, and what its gradient and
# that of what it multiplies move, backward: Triton reads two gradients' factors and writes one in a pass. Where only
# the sums are made, it reads them. What is run again for the magnitudes' gradient writes the update, to which the
# product adds.
_FACTOR, _FACTOR_BACKWARD, _SUMS, _UPDATE_AGAIN = 2, 3, 2, 2
# The same of plain PyTorch, backward. Its layer kernel adds the residual in a pass of its own where there is a factor,
# and multiplies gate and up by theirs once more.
_FACTOR_BACKWARD_PLAIN, _RESIDUAL_APART = 6, 3
# Operations that the lengths of a weight's rows take in plain PyTorch, for each of its parts and for each piece of
# that, and those of the factor and its gradient, by counting what a CPU dispatches.
_PART_CALLS, _PIECE_CALLS, _FACTOR_CALLS = 8, 8, 25
# Kernels that a GPU is given for them where Triton runs: one for each part; the quotient, the factor and their
# gradients.
_PART_LAUNCHES, _FACTOR_LAUNCHES = 1, 10
LENGTH_BYTES = 16 * 2**20
"""Of a piece of a weight that plain PyTorch widens to fp32 to take its rows' lengths (`kernels/dora.py`)."""
LENGTHS_MAX_RANK = 64
"""The highest rank of which Triton takes the lengths, in one reading of the weight (`kernels/dora.py`)."""


def reads_lengths_once(rank: int, *, uses_triton: bool) -> bool:
    """Whether the lengths of a weight's rows take one reading of it, or pieces in fp32 as in plain PyTorch."""
    return uses_triton and rank <= LENGTHS_MAX_RANK


@dataclass(frozen=True)
class Way:
    """How a micro-batch is run, as far as it decides what there is to do.

    `is_frozen`: the base is, and an adapter trained; `uses_triton`: its kernels run, not plain PyTorch. `adapter`: what
    DoRA needs to know of it; None: there is none, or plain LoRA.
    """

    layers: str
    keep: tuple[Keep, ...]
    quantization: str
    keep_transposed: bool | None
    is_frozen: bool
    uses_triton: bool
    adapter: Adapted | None = None
    head_in_fp8: bool = False


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, into] x [into, out] whose `weights` are read; done `times`, and `again` times more.

    `is_grouped`: rows are routed, each to some of many experts' weights.
    """

    rows: float
    into: int
    out: int
    weights: int
    times: float
    again: float
    in_fp8: bool
    is_grouped: bool = False

    @property
    def flops(self) -> float:
        """Of doing it once; a multiply-add is two."""
        return 2.0 * self.rows * self.into * self.out

    @property
    def values(self) -> float:
        """That doing it once reads or writes."""
        return self.weights + self.rows * (self.into + self.out)


@dataclass(frozen=True)
class Mixing:
    """What mixers compute beside their linear layers, and routers: `flops` of a forward, done `times`, `again` more.

    `width`: channels of attention's heads, or of a scan, each of which runs by itself.
    """

    kind: Literal["products", "attention", "chunked_scan", "scan"]
    width: int
    flops: float
    times: float
    again: float


@dataclass(frozen=True)
class Amounts:
    """Of one micro-batch. `adapter_values`: what goes into and comes out of linear layers, once each; of experts'
    `routed_adapter_values`.

    `fused_values` and `op_by_op_values`: what elementwise work moves in layers that run through the layer kernel in
    Triton, and in others. `dequantised_bytes`: what turning weights into the compute type, or fp8's rows, moves.
    `head`: done once; how often decides who is trained. `fused_layers` and `op_by_op_layers`: how many launch so.
    `calls`: operations that plain PyTorch dispatches, and `adapter_calls` more with adapters on all linear layers.
    `measured_weights`, `factor_values`, `dora_calls`: of DoRA, the weights whose rows' lengths are taken, the values
    that multiplying by factors moves, and the operations that both dispatch on any device.
    """

    products: tuple[Product, ...]
    mixing: tuple[Mixing, ...]
    head: Product
    adapter_values: float
    fused_values: float
    op_by_op_values: float
    dequantised_bytes: float
    fused_layers: int
    op_by_op_layers: int
    document_tokens: float
    calls: float
    adapter_calls: float
    routed_adapter_values: float = 0.0
    measured_weights: float = 0.0
    factor_values: float = 0.0
    dora_calls: float = 0.0


@remember(0)
def amounts(spec: AnySpec, way: Way, tokens: float, document_tokens: float, trained_share: float) -> Amounts:
    """Returns what a micro-batch of `tokens` tokens does in documents of so many, of which a share is learned."""
    counted = _Counted(spec, way, tokens, document_tokens)
    for (layer, rung), count in _layers(spec, way.keep):
        counted.add(layer, rung, count)
    vocabulary = spec.vocab_size
    head = Product(
        tokens * trained_share,
        spec.hidden_size,
        vocabulary,
        vocabulary * spec.hidden_size,
        1.0,
        0.0,
        in_fp8=way.head_in_fp8,
    )
    fused = sum(way.layers == "fused" and not why_not_llama(layer) for layer in spec.layers)
    return Amounts(
        products=tuple(counted.products),
        mixing=tuple(counted.mixing),
        head=head,
        adapter_values=counted.totals["adapter"],
        fused_values=counted.totals["fused"],
        op_by_op_values=counted.totals["op by op"],
        dequantised_bytes=counted.totals["dequantised"],
        fused_layers=fused,
        op_by_op_layers=len(spec.layers) - fused,
        document_tokens=counted.document_tokens,
        calls=counted.totals["calls"],
        adapter_calls=counted.totals["adapter calls"],
        routed_adapter_values=counted.totals["routed adapter"],
        measured_weights=counted.totals["measured"],
        factor_values=counted.totals["factors"],
        dora_calls=counted.totals["dora calls"],
    )


def _layers(spec: AnySpec, keep: tuple[Keep, ...]) -> list[tuple[tuple[LayerSpec, Keep], int]]:
    """Returns the distinct layers and rungs, each with how many there are of it."""
    # By identity first: most layers are one object, and hashing each takes longer than all else here.
    counts = Counter(zip(map(id, spec.layers), keep, strict=True))
    objects = {id(layer): layer for layer in spec.layers}
    total: Counter[tuple[LayerSpec, Keep]] = Counter()
    for (identity, rung), count in counts.items():
        total[objects[identity], rung] += count
    return list(total.items())


class _Counted:
    """Adds up layers."""

    def __init__(self, spec: AnySpec, way: Way, tokens: float, document_tokens: float) -> None:
        self.spec, self.way, self.tokens = spec, way, tokens
        self.document_tokens = max(1, round(document_tokens))
        self.products: list[Product] = []
        self.mixing: list[Mixing] = []
        self.totals: defaultdict[str, float] = defaultdict(float)

    def add(self, layer: LayerSpec, rung: Keep, count: int) -> None:
        """Adds `count` layers."""
        hidden_size, way = self.spec.hidden_size, self.way
        is_fused = way.layers == "fused" and not why_not_llama(layer)
        again = activations.run_again(layer, hidden_size, rung, is_fused=is_fused, adapter=way.adapter)
        again += activations.by_mixture(layer)
        passes = 2 if way.is_frozen else 3
        linears = arithmetic.linears(layer, hidden_size)
        self._add_calls(rung, count, len(linears), is_fused=is_fused)
        for name, linear in linears.items():
            rows, into, out = self.tokens * linear.used, linear.in_features, sum(linear.out_features)
            weights = linear.weights * max(1, linear.experts)
            times, repeated = count * passes, count * again.count(name)
            in_fp8, is_grouped = way.quantization == "fp8" and not linear.experts, bool(linear.experts)
            self.products.append(Product(rows, into, out, weights, times, repeated, in_fp8, is_grouped))
            self.totals["routed adapter" if is_grouped else "adapter"] += count * rows * (into + out)
            moved = self._dequantised(weights, 2 + again.count(name), rows * (into + out))
            self.totals["dequantised"] += count * moved
            if way.adapter is not None and way.adapter.dora and name in way.adapter.names and not linear.experts:
                self._add_dora(name, linear, count, again.count(name), is_fused=is_fused)
        for name, part in parts(layer, hidden_size).items():
            kind, width = _kind(layer, name)
            flops = self.tokens * part.flops(self.document_tokens)
            self.mixing.append(Mixing(kind, width, flops, 3 * count, count * (name in again)))
        moved = (1.0 + _AGAIN[rung]) * self.tokens * _elementwise_values(layer, hidden_size)
        # On plain PyTorch a fused layer has the kernels of one that runs op by op.
        self.totals["fused" if is_fused and way.uses_triton else "op by op"] += count * moved
        # A mixture is one operation wherever it is.
        routed = self.tokens * _routed_values(layer, hidden_size)
        self.totals["fused" if way.uses_triton else "op by op"] += count * routed

    def _add_calls(self, rung: Keep, count: int, num_linears: int, *, is_fused: bool) -> None:
        calls = _CALLS_FUSED[rung] if is_fused else _CALLS_OP_BY_OP * (1.0 + _CALLS_AGAIN * (rung != "all"))
        self.totals["calls"] += count * calls
        each = _ADAPTER_CALLS_FUSED if is_fused else _ADAPTER_CALLS_OP_BY_OP
        self.totals["adapter calls"] += count * num_linears * each

    def _add_dora(self, name: str, linear: Linear, count: int, again: int, *, is_fused: bool) -> None:
        """Adds what DoRA does on `count` linear layers beside their products, which are run `again` so many times.

        The layer kernel takes the lengths once; a layer that runs again op by op takes them again.
        """
        out, taken = sum(linear.out_features), 1 if is_fused else 1 + again
        moved = self._factor_values(name, again, is_fused=is_fused)
        self.totals["factors"] += count * self.tokens * out * moved
        self.totals["measured"] += count * taken * linear.weights
        if self.way.uses_triton:
            lengths, others = _PART_LAUNCHES * len(linear.out_features), _FACTOR_LAUNCHES
        else:
            rows, others = max(1, LENGTH_BYTES // (4 * linear.in_features)), _FACTOR_CALLS
            lengths = sum(_PART_CALLS + _PIECE_CALLS * math.ceil(part / rows) for part in linear.out_features)
        self.totals["dora calls"] += count * (taken * lengths + others)

    def _factor_values(self, name: str, again: int, *, is_fused: bool) -> int:
        """Values an output that DoRA's factor and its gradient move, of a linear layer that is run `again`."""
        in_triton = self.way.uses_triton
        backward = _FACTOR_BACKWARD if in_triton else _FACTOR_BACKWARD_PLAIN
        if not is_fused:
            return _FACTOR * (1 + again) + backward
        if name == "feed_forward.gate_up":  # the activation's kernels multiply what they read
            return 0 if in_triton else 2 * _FACTOR + backward
        if name not in activations.FOR_MAGNITUDES:
            return _FACTOR * (1 + again) + backward
        # The run for the magnitude's gradient has no factor; of `down` its gradient is made before there are sums.
        if not in_triton:
            return (_FACTOR + _RESIDUAL_APART) * again + backward
        apart = _FACTOR + _SUMS if name == "feed_forward.down" else backward
        return _FACTOR * again + apart + _UPDATE_AGAIN

    def _dequantised(self, weights: int, times: int, values: float) -> float:
        kind = self.way.quantization
        if kind == "fp8":  # rows are read and written in fp8 on their way in; weights transposed where no copy is kept
            return 3 * values + (0 if self.way.keep_transposed else 2 * weights)
        return times * BYTES_MADE_DENSE.get(kind, 0.0) * weights


def _kind(layer: LayerSpec, name: str) -> tuple[Literal["products", "attention", "chunked_scan", "scan"], int]:
    """Returns what a part computes beside its linear layers, and the channels of attention's heads or of a scan."""
    mixer = layer.mixer
    if name == "feed_forward":
        return "products", 0
    if isinstance(mixer, SideBySideSpec):
        mixer = mixer.attention
    if isinstance(mixer, AttentionSpec):
        return "attention", mixer.head_dim
    if isinstance(mixer, LatentAttentionSpec):
        return "attention", mixer.nope_dim + mixer.rope.dim
    if isinstance(mixer, BorrowedMixer):
        return "attention", 64
    if isinstance(mixer, Mamba2Spec):
        return "chunked_scan", 0
    return "scan", mixer.inner_size if isinstance(mixer, Mamba1Spec) else 0


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
        total += _GATED * feed_forward.shared_size
    return total


def _routed_values(layer: LayerSpec, hidden_size: int) -> float:
    """The same that a mixture's gates move, and the sums of each token's rows, of outputs and of inputs' gradients.

    Products read rows where they lie.
    """
    mixture = layer.feed_forward
    if not isinstance(mixture, ExpertsSpec):
        return 0.0
    return mixture.top_k * (_GATED * mixture.intermediate_size + 2 * hidden_size) + 2 * hidden_size
