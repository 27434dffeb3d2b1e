"""What an architecture costs: parameters, floating-point operations, bytes saved for backward. Exact counts, no torch.

FLOPs count a multiply-add as two and leave out norms, activations and softmax, as is usual (Kaplan et al.,
arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B). Saved bytes follow Stoker's own modules, in the
manner of Korthikanti et al., arXiv:2205.05198.
"""

from collections.abc import Collection

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec


def parameters_by_part(spec: ArchSpec) -> dict[str, int]:
    """Number of parameters of embedding, attention, feed_forward, norms and head (0 when tied to the embedding)."""
    head = 0 if spec.tied_head else spec.vocab_size * (spec.hidden_size + spec.head_bias)
    return {
        "embedding": spec.vocab_size * spec.hidden_size,
        "attention": sum(_attention_weights(layer.mixer, spec.hidden_size) for layer in spec.layers)
        + sum(_attention_biases(layer.mixer, spec.hidden_size) for layer in spec.layers),
        "feed_forward": sum(_feed_forward_weights(layer, spec.hidden_size) for layer in spec.layers)
        + sum(_feed_forward_biases(layer, spec.hidden_size) for layer in spec.layers),
        "norms": (2 * len(spec.layers) + 1) * spec.hidden_size,
        "head": head,
    }


def num_parameters(spec: ArchSpec) -> int:
    """Number of parameters of the whole model, a tied head counted once."""
    return sum(parameters_by_part(spec).values())


def linear_shapes(spec: ArchSpec) -> dict[str, tuple[int, int]]:
    """(in, out) features of every linear layer of the blocks, by its Hugging Face module name, in file order."""
    shapes = {}
    names = {entry.ours: [name.removesuffix(".weight") for name in entry.theirs] for entry in weight_map(spec)}
    for index, layer in enumerate(spec.layers):
        for linear, (in_features, out_features) in _linears(layer, spec.hidden_size).items():
            parts = zip(names[f"blocks.{index}.{linear}.weight"], out_features, strict=True)
            shapes |= {name: (in_features, size) for name, size in parts}
    return shapes


def lora_parameters(spec: ArchSpec, rank: int, names: Collection[str] | None = None) -> int:
    """Number of parameters of adapters of `rank`: A [rank, in] and B [out, rank] for each linear layer.

    `names`: full Hugging Face module names or their endings, such as "q_proj"; None: every linear layer of the blocks.
    """
    return sum(
        rank * (in_features + out_features)
        for module, (in_features, out_features) in linear_shapes(spec).items()
        if names is None or any(f".{module}".endswith(f".{name}") for name in names)
    )


def flops_per_token(spec: ArchSpec, sequence_length: int) -> float:
    """FLOPs of a forward per token of a document of `sequence_length` tokens, averaged over its positions.

    Two for each weight of a matmul, the head's included, and four for each channel of each query head and key seen.
    """
    weights = spec.vocab_size * spec.hidden_size
    attention = 0.0
    for layer in spec.layers:
        mixer = layer.mixer
        weights += _attention_weights(mixer, spec.hidden_size) + _feed_forward_weights(layer, spec.hidden_size)
        attention += 4 * mixer.num_heads * mixer.head_dim * _mean_keys(sequence_length, mixer.window)
    return 2 * weights + attention


def training_flops_per_token(spec: ArchSpec, sequence_length: int, *, frozen_base: bool) -> float:
    """FLOPs of forward and backward per token, without those of adapters and of what is computed again.

    A backward costs twice its forward: once for the gradient of what comes in, once for that of the weights. A frozen
    base has only the first for its matmuls; attention, which has no weights, has both.
    """
    forward = flops_per_token(spec, sequence_length)
    attention = sum(
        4 * layer.mixer.num_heads * layer.mixer.head_dim * _mean_keys(sequence_length, layer.mixer.window)
        for layer in spec.layers
    )
    return forward + (forward + attention if frozen_base else 2 * forward)


def layer_flops_per_token(layer: LayerSpec, hidden_size: int, sequence_length: int) -> dict[str, float]:
    """FLOPs of a layer's forward a token, by part: qkv, attention, out, gate_up, down."""
    mixer, inner = layer.mixer, layer.feed_forward.intermediate_size
    query = mixer.num_heads * mixer.head_dim
    return {
        "qkv": 2.0 * hidden_size * (query + 2 * mixer.num_kv_heads * mixer.head_dim),
        "attention": 4.0 * query * _mean_keys(sequence_length, mixer.window),
        "out": 2.0 * query * hidden_size,
        "gate_up": 4.0 * hidden_size * inner,
        "down": 2.0 * inner * hidden_size,
    }


def saved_activation_bytes(spec: ArchSpec, tokens: int, bytes_per_value: int) -> int:
    """Bytes that layers which run op by op hold for backward after a forward over `tokens` tokens of a micro-batch.

    Adapters' own products (rank values a token and layer group) and the loss are not counted.
    """
    return sum(saved_by_layer(layer, spec.hidden_size, tokens, bytes_per_value) for layer in spec.layers)


def saved_by_layer(layer: LayerSpec, hidden_size: int, tokens: int, bytes_per_value: int) -> int:
    """Bytes that a layer which runs op by op under autograd saves for its backward."""
    mixer = layer.mixer
    # Both norms' inputs and outputs; q, k, v; attention's output; gate and up; their product.
    values = 4 * hidden_size
    values += (2 * mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim
    values += 3 * layer.feed_forward.intermediate_size
    # fp32 whatever the dtype: the log-sum of each head's scores, and one number a norm.
    statistics = 4 * (mixer.num_heads + 2)
    return tokens * (values * bytes_per_value + statistics)


def _linears(layer: LayerSpec, hidden_size: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """In features and the parts' out features of a block's linear layers, by our names."""
    mixer, inner = layer.mixer, layer.feed_forward.intermediate_size
    q_size, kv_size = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    return {
        "attention.qkv": (hidden_size, (q_size, kv_size, kv_size)),
        "attention.out": (q_size, (hidden_size,)),
        "feed_forward.gate_up": (hidden_size, (inner, inner)),
        "feed_forward.down": (inner, (hidden_size,)),
    }


def _attention_weights(mixer: AttentionSpec, hidden_size: int) -> int:
    return hidden_size * mixer.head_dim * (2 * mixer.num_heads + 2 * mixer.num_kv_heads)


def _attention_biases(mixer: AttentionSpec, hidden_size: int) -> int:
    return mixer.qkv_bias * mixer.head_dim * (mixer.num_heads + 2 * mixer.num_kv_heads) + mixer.out_bias * hidden_size


def _feed_forward_weights(layer: LayerSpec, hidden_size: int) -> int:
    return 3 * hidden_size * layer.feed_forward.intermediate_size


def _feed_forward_biases(layer: LayerSpec, hidden_size: int) -> int:
    return layer.feed_forward.bias * (2 * layer.feed_forward.intermediate_size + hidden_size)


def _mean_keys(sequence_length: int, window: int | None) -> float:
    """Keys that a position of a document sees, averaged over its positions: at most the window, itself included."""
    reach = min(window or sequence_length, sequence_length)
    ramp = reach * (reach + 1) / 2
    return (ramp + (sequence_length - reach) * reach) / sequence_length
