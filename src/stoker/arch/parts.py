"""What a mixer or a feed-forward consists of: its parameters by our names, and what a token costs in it. No torch.

One function for each type of spec, in `PARTS`. Whatever counts (arithmetic, activations, the plan) and whatever names
weights (`families.names`) reads them here, so that a new type is one function and one line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from stoker.arch.spec import AttentionSpec, ExpertsSpec, GatedSpec, LayerSpec, NormSpec, PlainSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer with its input's and its parts' sizes; parts have Hugging Face layers of their own, or share one.

    `used`: how many times a token passes it on average. `experts`: how many of them lie in a first dimension (0: none).
    """

    in_features: int
    out_features: tuple[int, ...]
    bias: bool = False
    used: float = 1.0
    experts: int = 0

    @property
    def weights(self) -> int:
        """Values of the weight, of one expert if there are several."""
        return self.in_features * sum(self.out_features)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of weight and bias."""
        leading = (self.experts,) if self.experts else ()
        shapes = {"weight": (*leading, sum(self.out_features), self.in_features)}
        return shapes | ({"bias": (*leading, sum(self.out_features))} if self.bias else {})


@dataclass(frozen=True)
class Part:
    """A mixer or a feed-forward: `linears` and all other `parameters`, by our names within it.

    `flops` of a document of so many tokens: those beside the linear layers, a token on average. Saved for the backward
    by a token that runs op by op: `saved_values` in the compute type, the output of each linear layer that is needed
    again among them but not what comes in, and `saved_statistics` in fp32. `widest`: values a token of its largest
    tensor.
    """

    linears: Mapping[str, Linear]
    parameters: Mapping[str, Shape]
    saved_values: int
    saved_statistics: int
    widest: int
    flops: Callable[[int], float] = field(default=lambda sequence_length: 0.0, compare=False)


@lru_cache(maxsize=1024)  # a plan asks for the same few layers thousands of times
def parts(layer: LayerSpec, hidden_size: int) -> Mapping[str, Part]:
    """The layer's mixer and feed-forward, by our names in the block ("attention", "feed_forward"), of those it has."""
    named = {layer.mixer_name: layer.mixer, "feed_forward": layer.feed_forward}
    return {name: part(spec, hidden_size) for name, spec in named.items() if spec is not None}


def part(spec: Any, hidden_size: int) -> Part:
    """The parts of a mixer's or a feed-forward's spec; raises TypeError for a type that nobody has described."""
    if type(spec) not in PARTS:
        raise TypeError(f"arch/parts.py does not say what a {type(spec).__name__} consists of")
    return PARTS[type(spec)](spec, hidden_size)


def layer_parameters(layer: LayerSpec, hidden_size: int) -> dict[str, Shape]:
    """Shapes of all the layer's parameters by our names in the block, norms first."""
    shapes: dict[str, Shape] = {}
    for name in layer.norm_names:
        shapes |= norm_parameters(name, layer.norm, (hidden_size,))
    for name, one in parts(layer, hidden_size).items():
        for linear, sizes in one.linears.items():
            shapes |= {f"{name}.{linear}.{kind}": shape for kind, shape in sizes.shapes.items()}
        shapes |= {f"{name}.{parameter}": shape for parameter, shape in one.parameters.items()}
    return shapes


def norm_parameters(name: str, norm: NormSpec, shape: Shape) -> dict[str, Shape]:
    """Shapes of a norm's parameters over channels of `shape`."""
    kinds = [kind for kind, there in (("weight", norm.weight), ("bias", norm.bias)) if there]
    return {f"{name}.{kind}": shape for kind in kinds}


def mean_keys(sequence_length: int, window: int | None) -> float:
    """Keys that a position of a document sees, averaged over its positions: at most the window, itself included."""
    reach = min(window or sequence_length, sequence_length)
    ramp = reach * (reach + 1) / 2
    return (ramp + (sequence_length - reach) * reach) / sequence_length


def qk_norm_shapes(spec: AttentionSpec) -> tuple[Shape, Shape]:
    """Shapes of the weights of the queries' and the keys' norm."""
    match spec.qk_norm_over:
        case "head":
            return (spec.head_dim,), (spec.head_dim,)
        case "each_head":
            return (spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim)
        case "all":
            return (spec.num_heads * spec.head_dim,), (spec.num_kv_heads * spec.head_dim,)


def _attention(spec: AttentionSpec, hidden_size: int) -> Part:
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    parameters: dict[str, Shape] = {}
    # q, k, v and the attended values; one log-sum of scores a head.
    saved = 2 * query + 2 * key
    if spec.qk_norm is not None:
        q_shape, k_shape = qk_norm_shapes(spec)
        parameters |= norm_parameters("q_norm", spec.qk_norm, q_shape)
        parameters |= norm_parameters("k_norm", spec.qk_norm, k_shape)
        saved += query + 2 * key  # what the norms read is kept as well, with v beside it in one tensor
    if spec.sinks:
        parameters["sinks"] = (spec.num_heads,)
    return Part(
        linears={
            "qkv": Linear(hidden_size, (query, key, key), spec.qkv_bias),
            "out": Linear(query, (hidden_size,), spec.out_bias),
        },
        parameters=parameters,
        saved_values=saved,
        saved_statistics=spec.num_heads,
        widest=query + 2 * key,
        flops=lambda sequence_length: 4.0 * query * mean_keys(sequence_length, spec.window),
    )


def _gated(spec: GatedSpec, hidden_size: int) -> Part:
    inner = spec.intermediate_size
    return Part(
        linears={
            "gate_up": Linear(hidden_size, (inner, inner), spec.bias),
            "down": Linear(inner, (hidden_size,), spec.bias),
        },
        parameters={},
        # gate, up and their product; the SwiGLU kernel makes the activation again, other gates keep it.
        saved_values=(3 if spec.activation == "silu" else 4) * inner,
        saved_statistics=0,
        widest=inner,
    )


def _plain(spec: PlainSpec, hidden_size: int) -> Part:
    inner = spec.intermediate_size
    return Part(
        linears={"up": Linear(hidden_size, (inner,), spec.bias), "down": Linear(inner, (hidden_size,), spec.bias)},
        parameters={},
        saved_values=2 * inner,
        saved_statistics=0,
        widest=inner,
    )


def _experts(spec: ExpertsSpec, hidden_size: int) -> Part:
    inner, experts, used = spec.intermediate_size, spec.num_experts, float(spec.top_k)
    linears = {
        # Gate and up of an expert are one 3-D parameter in Transformers, and so have one adapter.
        "gate_up": Linear(hidden_size, (2 * inner,), spec.bias, used=used, experts=experts),
        "down": Linear(inner, (hidden_size,), spec.bias, used=used, experts=experts),
    }
    parameters: dict[str, Shape] = {"router.weight": (experts, hidden_size)}
    if spec.router.bias:
        parameters["router.bias"] = (experts,)
    if spec.router.correction:
        parameters["router.correction"] = (experts,)
    # The mixture makes gate and up again; its index and weights; logits and scores of the router in fp32.
    saved, statistics, gates = 0, 4 * spec.top_k + 3 * experts, experts
    if spec.shared_size:
        linears["shared.gate_up"] = Linear(hidden_size, (spec.shared_size, spec.shared_size))
        linears["shared.down"] = Linear(spec.shared_size, (hidden_size,))
        saved += 3 * spec.shared_size
    if spec.shared_gate:
        parameters["shared_gate.weight"] = (1, hidden_size)
        saved, gates = saved + hidden_size, gates + 1
    return Part(
        linears=linears,
        parameters=parameters,
        saved_values=saved,
        saved_statistics=statistics,
        # While it runs: gate and up of the chosen experts, and the gradient of their inputs or their outputs.
        widest=spec.top_k * (3 * inner + hidden_size),
        flops=lambda sequence_length: 2.0 * gates * hidden_size,
    )


PARTS: dict[type, Callable[[Any, int], Part]] = {
    AttentionSpec: _attention,
    GatedSpec: _gated,
    PlainSpec: _plain,
    ExpertsSpec: _experts,
}
"""What each type of mixer and feed-forward consists of, from its spec and the hidden size."""
