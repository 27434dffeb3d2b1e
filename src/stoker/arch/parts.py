"""What a mixer or a feed-forward consists of: its parameters by our names, and what a token costs in it. No torch.

One function for each type of spec, in `PARTS`. Whatever counts (arithmetic, activations, the plan) and whatever names
weights (`families.names`) reads them here, so that a new type is one function and one line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from stoker.arch.borrowed import BorrowedMixer
from stoker.arch.spec import (
    AttentionSpec,
    ExpertsSpec,
    GatedSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba1Spec,
    Mamba2Spec,
    NormSpec,
    PlainSpec,
    SideBySideSpec,
)

Shape = tuple[int, ...]
GATES = ("silu", "gelu", "gelu_tanh")
"""Activations of gated feed-forwards that have a kernel (`kernels/glu.py`)."""


@dataclass(frozen=True)
class Linear:
    """A linear layer with its input's and its parts' sizes; parts have Hugging Face layers of their own, or share one.

    `used`: how many times a token passes it on average. `experts`: how many of them lie in a first dimension (0: none).
    `by_name_only`: "all-linear" leaves it out (`nn.linear.FusedLinear`).
    """

    in_features: int
    out_features: tuple[int, ...]
    bias: bool = False
    used: float = 1.0
    experts: int = 0
    by_name_only: bool = False

    @property
    def weights(self) -> int:
        """Values of the weight, of one expert if there are several."""
        return self.in_features * sum(self.out_features)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of weight and bias."""
        out: Shape = (sum(self.out_features),)
        out = (self.experts, *out) if self.experts else out
        shapes: dict[str, Shape] = {"weight": (*out, self.in_features)}
        return shapes | ({"bias": out} if self.bias else {})


@dataclass(frozen=True)
class Part:
    """A mixer or a feed-forward: `linears` and all other `parameters`, by our names within it.

    `flops` of a document of so many tokens: those beside the linear layers, a token on average. Saved for the backward
    by a token that runs op by op: `saved_values` in the compute type and `saved_statistics` in fp32, with plain PyTorch
    `plain_values` and `plain_statistics` more, where norms are trained `trained_statistics`; and what goes into linear
    layers where their weights' gradients need it: `inputs` of those whose input nothing else keeps, and the part's own,
    which those of `of_input` read (`keeps_input`: it is kept in any case). `widest`: values a token of its largest
    tensor.
    """

    linears: Mapping[str, Linear]
    parameters: Mapping[str, Shape]
    saved_values: int
    saved_statistics: int
    widest: int
    inputs: Mapping[str, int] = field(default_factory=dict)
    of_input: tuple[str, ...] = ()
    keeps_input: bool = False
    plain_values: int = 0
    plain_statistics: int = 0
    trained_statistics: int = 0
    flops: Callable[[int], float] = field(default=lambda sequence_length: 0.0, compare=False)


@lru_cache(maxsize=1024)  # a plan asks for the same few layers thousands of times
def parts(layer: LayerSpec, hidden_size: int) -> Mapping[str, Part]:
    """The layer's mixer and feed-forward, by our names in the block ("attention", "feed_forward"), of those it has."""
    named = {layer.mixer_name: layer.mixer, "feed_forward": layer.feed_forward}
    return {name: part(spec, hidden_size) for name, spec in named.items() if spec is not None}


@lru_cache(maxsize=1024)
def linears_of(layer: LayerSpec, hidden_size: int) -> Mapping[str, Linear]:
    """The linear layers of a block by our names in it ("attention.qkv"), in the order in which they run."""
    inside = parts(layer, hidden_size)
    return {f"{name}.{linear}": sizes for name, part in inside.items() for linear, sizes in part.linears.items()}


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
    if spec.qk_norm is not None:
        q_shape, k_shape = qk_norm_shapes(spec)
        parameters |= norm_parameters("q_norm", spec.qk_norm, q_shape)
        parameters |= norm_parameters("k_norm", spec.qk_norm, k_shape)
    saved, plain, statistics, plain_statistics = _heads(spec, query, key)
    if spec.sinks:
        parameters["sinks"] = (spec.num_heads,)
    return Part(
        linears={
            "qkv": Linear(hidden_size, (query, key, key), spec.qkv_bias),
            "out": Linear(query, (hidden_size,), spec.out_bias),
        },
        parameters=parameters,
        # q, k, v and the attended values; one log-sum of scores a head.
        saved_values=2 * query + 2 * key + saved,
        saved_statistics=spec.num_heads + statistics,
        plain_values=plain,
        plain_statistics=plain_statistics,
        # What is multiplied by each head's weight.
        trained_statistics=query + key if spec.qk_norm is not None and spec.qk_norm_over == "each_head" else 0,
        of_input=("qkv",),
        widest=query + 2 * key,
        flops=lambda sequence_length: 4.0 * query * mean_keys(sequence_length, spec.window),
    )


def _heads(spec: AttentionSpec, query: int, key: int) -> tuple[int, int, int, int]:
    """Values that turning and norming heads keeps besides what attention reads; with plain PyTorch; the same in fp32.

    One pass splits and turns q, k and v, and may norm whole heads before (`nn.attention.Attention`). Else v is a view
    of what the projection gave, all of which stays beside the turned q and k.
    """
    norm, rope, heads = spec.qk_norm, spec.rope, spec.num_heads + spec.num_kv_heads
    is_plain = spec.clip_qkv is None and spec.qkv_layout == "blocks"
    if norm is None and is_plain:
        return 0, 0, 0, 0
    is_fused = is_plain and norm is not None and norm.kind == "rms" and norm.weight and spec.qk_norm_over == "head"
    if is_fused and rope is not None and rope.dim == spec.head_dim and not rope.interleaved:
        # The kernel writes v anew, and makes the statistics again.
        return query + 2 * key, -key, 0, heads
    clipped = key if spec.clip_qkv is not None else 0
    if norm is None:
        return (query + key if rope is not None or clipped else 0) + clipped, 0, 0, 0
    both = query + key
    if spec.qk_norm_over == "each_head":  # what is normed, in fp32
        numbers = (2 if norm.kind == "layer" else 1) * heads
        return both + clipped, 0, both + numbers, -both
    if spec.qk_norm_over == "all":
        return both + clipped, 0, 2, 0
    # The kernels of norms read rows without gaps, which heads between others are not.
    statistics, plain = (0, 2 * heads) if norm.kind == "layer" else (heads, 0)
    return 2 * both + clipped, -both, statistics, plain


def _latent(spec: LatentAttentionSpec, hidden_size: int) -> Part:
    head = spec.nope_dim + spec.rope.dim
    queries, values = spec.num_heads * head, spec.num_heads * spec.value_dim
    down = (spec.query_rank or queries, spec.latent_rank + spec.rope.dim)
    linears = {"down": Linear(hidden_size, down, spec.bias)}
    parameters: dict[str, Shape] = {}
    if spec.query_rank is not None:
        linears["query_up"] = Linear(spec.query_rank, (queries,))
        parameters |= norm_parameters("q_norm", spec.norm, (spec.query_rank,))
    linears["up"] = Linear(spec.latent_rank, (spec.num_heads * (spec.nope_dim + spec.value_dim),))
    linears["out"] = Linear(values, (hidden_size,), spec.bias)
    parameters |= norm_parameters("kv_norm", spec.norm, (spec.latent_rank,))
    return Part(
        linears=linears,
        parameters=parameters,
        # What the norms read; whole queries and keys, padded values and what is attended.
        saved_values=sum(down) + 4 * queries,
        saved_statistics=spec.num_heads + (1 if spec.query_rank is None else 2),
        # What the norms make, and what is attended without the padding.
        inputs=({} if spec.query_rank is None else {"query_up": spec.query_rank})
        | {"up": spec.latent_rank}
        | ({} if spec.value_dim == head else {"out": values}),
        of_input=("down",),
        widest=3 * queries,
        # Values are padded to the size of queries, because fast kernels want one size.
        flops=lambda sequence_length: 4.0 * queries * mean_keys(sequence_length, None),
    )


def _gated(spec: GatedSpec, hidden_size: int) -> Part:
    inner = spec.intermediate_size
    has_kernel = spec.activation in GATES and (spec.gate_scale, spec.down_scale) == (1.0, 1.0)
    return Part(
        linears={
            "gate_up": Linear(hidden_size, (inner, inner), spec.bias),
            "down": Linear(inner, (hidden_size,), spec.bias),
        },
        parameters={},
        # gate and up; a kernel makes the activation again, plain PyTorch that of SwiGLU alone.
        saved_values=2 * inner if has_kernel else (3 + (spec.gate_scale != 1.0)) * inner,
        saved_statistics=0,
        plain_values=inner if has_kernel and spec.activation != "silu" else 0,
        inputs={"down": inner},
        of_input=("gate_up",),
        widest=inner,
    )


def _plain(spec: PlainSpec, hidden_size: int) -> Part:
    inner = spec.intermediate_size
    return Part(
        linears={"up": Linear(hidden_size, (inner,), spec.bias), "down": Linear(inner, (hidden_size,), spec.bias)},
        parameters={},
        saved_values=inner,
        saved_statistics=0,
        # The rectifier keeps what it gives, which is what "down" reads.
        inputs={} if spec.activation == "relu" else {"down": inner},
        of_input=("up",),
        widest=inner,
    )


def _experts(spec: ExpertsSpec, hidden_size: int) -> Part:
    inner, experts, used = spec.intermediate_size, spec.num_experts, float(spec.top_k)
    linears = {
        # Gate and up of an expert are one 3-D parameter in Transformers, and so have one adapter.
        "experts.gate_up": Linear(hidden_size, (2 * inner,), spec.bias, used=used, experts=experts),
        "experts.down": Linear(inner, (hidden_size,), spec.bias, used=used, experts=experts),
    }
    parameters: dict[str, Shape] = {"router.weight": (experts, hidden_size)}
    if spec.router.bias:
        parameters["router.bias"] = (experts,)
    if spec.router.correction:
        parameters["router.correction"] = (experts,)
    inputs: dict[str, int] = {}
    saved, gates = 0, experts
    if spec.shared_size:
        linears["shared.gate_up"] = Linear(hidden_size, (spec.shared_size, spec.shared_size))
        linears["shared.down"] = Linear(spec.shared_size, (hidden_size,))
        saved, inputs = 2 * spec.shared_size, {"shared.down": spec.shared_size}
    statistics, plain_statistics = _routing(spec)
    if spec.shared_gate:
        parameters["shared_gate.weight"] = (1, hidden_size)
        saved, gates = saved + hidden_size + 1, gates + 1
    return Part(
        linears=linears,
        parameters=parameters,
        # The mixture makes gate and up again.
        saved_values=saved,
        saved_statistics=statistics,
        plain_statistics=plain_statistics,
        inputs=inputs,
        of_input=(("shared.gate_up",) if spec.shared_size else ()) + (("shared_gate",) if spec.shared_gate else ()),
        keeps_input=True,
        # While its backward runs: gate and up of the chosen experts with the gradient of the activation, whose places
        # their own gradients and the activation take; then those of gate and up, and of what went in, before and after
        # it is summed for each token.
        widest=max(3 * spec.top_k * inner, spec.top_k * (2 * inner + hidden_size) + hidden_size),
        flops=lambda sequence_length: 2.0 * gates * hidden_size,
    )


def _routing(spec: ExpertsSpec) -> tuple[int, int]:
    """Values of four bytes that choosing and sorting keep, and with plain PyTorch more or fewer.

    The weights, and three indices for each choice. A kernel that chooses keeps logits and choices; otherwise scores,
    choices in eight bytes, their scores, and the sum that divides them.
    """
    router, top_k, experts = spec.router, spec.top_k, spec.num_experts
    sorted_ = 4 * top_k
    if router.score == "softmax_of_chosen":
        plain = 3 * top_k
    else:
        plain = experts + 2 * top_k
        plain += (top_k if router.normalized or router.scale != 1.0 else 0) + (1 if router.normalized else 0)
    chosen = experts + top_k
    is_plain = router.score != "sigmoid" and router.groups == 1 and not router.correction
    return (sorted_ + chosen, plain - chosen) if is_plain else (sorted_ + plain, 0)


def _borrowed(spec: BorrowedMixer, hidden_size: int) -> Part:
    del hidden_size  # what comes in is counted among the linear layers' inputs
    return Part(
        linears={name: Linear(into, (out,)) for name, into, out in spec.linears},
        parameters={},
        saved_values=spec.saved_values,
        saved_statistics=0,
        keeps_input=True,
        widest=spec.widest,
        flops=lambda sequence_length: 4.0 * spec.attention_width * mean_keys(sequence_length, None),
    )


def _mamba1(spec: Mamba1Spec, hidden_size: int) -> Part:
    inner, rank, states = spec.inner_size, spec.time_step_rank, spec.state_size
    parameters = _conv(inner, spec.conv_kernel, has_bias=spec.conv_bias)
    if spec.parameter_norm is not None:
        for name, size in (("dt", rank), ("b", states), ("c", states)):
            parameters |= norm_parameters(f"{name}_norm", spec.parameter_norm, (size,))
    parameters |= {"dt_weight": (inner, rank), "dt_bias": (inner,), "A_log": (inner, states), "D": (inner,)}
    return Part(
        linears={
            "in_proj": Linear(hidden_size, (2 * inner,), spec.bias),
            "x_proj": Linear(inner, (rank + 2 * states,)),
            "out_proj": Linear(inner, (hidden_size,), spec.bias, by_name_only=True),
        },
        parameters=parameters,
        # What the input's projection gives and what the output's reads; what lies between is computed again.
        saved_values=2 * inner,
        saved_statistics=0,
        inputs={"out_proj": inner},
        of_input=("in_proj",),
        widest=_SCANNED_TENSORS * inner,
        # A multiply-add counts two: the convolution, the widening of the step sizes, and the recurrence of each state
        # (algorithm 2 of arXiv:2312.00752): dt A, dt B x and C h one each, a h + b two, and the sum over states one.
        flops=lambda sequence_length: 2.0 * inner * (spec.conv_kernel + rank) + 6.0 * inner * states,
    )


def _mamba2(spec: Mamba2Spec, hidden_size: int) -> Part:
    inner, group = spec.num_heads * spec.head_dim, spec.num_groups * spec.state_size
    convolved, heads = inner + 2 * group, spec.num_heads
    parameters = _conv(convolved, spec.conv_kernel, has_bias=spec.conv_bias)
    parameters |= {"dt_bias": (heads,), "A_log": (heads,), "D": (heads,)}
    if spec.norm is not None:
        parameters |= norm_parameters("norm", spec.norm, (inner,))

    def flops(sequence_length: int) -> float:
        # arXiv:2405.21060, section 6: scores C B and their products with x within a chunk, over the positions seen
        # there; then what a position adds to its chunk's state and reads of the one before, and its passing on.
        seen = mean_keys(min(sequence_length, spec.chunk_size), None)
        states = inner * spec.state_size
        within = 2.0 * seen * (group + inner)
        return 2.0 * convolved * spec.conv_kernel + within + 4.0 * states + 2.0 * states / spec.chunk_size

    projected = inner + convolved + heads
    return Part(
        linears={
            "in_proj": Linear(hidden_size, (projected,), spec.bias),
            "out_proj": Linear(inner, (hidden_size,), spec.bias, by_name_only=True),
        },
        parameters=parameters,
        # What the input's projection gives and what the output's reads; what lies between is computed again.
        saved_values=projected,
        saved_statistics=0,
        inputs={"out_proj": inner},
        of_input=("in_proj",),
        widest=_RECOMPUTED_TENSORS * inner,
        flops=flops,
    )


def _conv(channels: int, kernel_size: int, *, has_bias: bool) -> dict[str, Shape]:
    weight: dict[str, Shape] = {"conv.weight": (channels, 1, kernel_size)}
    return weight | {"conv.bias": (channels,)} if has_bias else weight


def _side_by_side(spec: SideBySideSpec, hidden_size: int) -> Part:
    named = {"attention": part(spec.attention, hidden_size), "state_space": part(spec.state_space, hidden_size)}
    scales = {"attention": spec.attention_in, "state_space": spec.state_space_in}
    both = named.values()
    inputs = {f"{name}.{linear}": size for name, one in named.items() for linear, size in one.inputs.items()}
    reads = {name: [f"{name}.{linear}" for linear in one.of_input] for name, one in named.items()}
    # What is scaled on its way in is another tensor.
    inputs |= {linear: hidden_size for name in named if scales[name] != 1.0 for linear in reads[name]}
    return Part(
        linears={f"{name}.{linear}": sizes for name, one in named.items() for linear, sizes in one.linears.items()},
        parameters={f"{name}.{key}": shape for name, one in named.items() for key, shape in one.parameters.items()},
        saved_values=sum(one.saved_values for one in both),
        saved_statistics=sum(one.saved_statistics for one in both),
        plain_values=sum(one.plain_values for one in both),
        plain_statistics=sum(one.plain_statistics for one in both),
        trained_statistics=sum(one.trained_statistics for one in both),
        inputs=inputs,
        of_input=tuple(linear for name in named if scales[name] == 1.0 for linear in reads[name]),
        widest=max(one.widest for one in both),
        flops=lambda sequence_length: sum(one.flops(sequence_length) for one in both),
    )


# Tensors of the inner size that a state space's backward holds at once: what it computes again, and their gradients.
_RECOMPUTED_TENSORS = 8
# Of a scan as well its states between pieces of a row, in fp32, twice: by what an H200 holds at the peak.
_SCANNED_TENSORS = 11

PARTS: dict[type, Callable[[Any, int], Part]] = {
    AttentionSpec: _attention,
    LatentAttentionSpec: _latent,
    Mamba1Spec: _mamba1,
    Mamba2Spec: _mamba2,
    SideBySideSpec: _side_by_side,
    GatedSpec: _gated,
    PlainSpec: _plain,
    ExpertsSpec: _experts,
    BorrowedMixer: _borrowed,
}
"""What each type of mixer and feed-forward consists of, from its spec and the hidden size."""
