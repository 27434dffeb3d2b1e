"""What many families share in `config.json`: attention, feed-forwards, the whole of the decoder, and what is refused.

A family of plain layers is a table of its model types' defaults, and what it has otherwise:

    reader = ConfigReader(config, where, _DEFAULTS)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    attention = read_attention(reader, rope=read_head_rope(reader), qkv_bias=True)
    return read_decoder(reader, LayerSpec(attention, read_gated(reader), norm), family="qwen", final_norm=norm)

Nothing here has a default for a size: an absent key has the one in the family's table, or is an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import Activation, ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, RopeSpec

LIKE_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Defaults of Transformers' LlamaConfig, Llama 7B's, from which those of several other model types were copied."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""Transformers' names of layers' kinds."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}


def read_decoder(
    reader: ConfigReader, layers: LayerSpec | Sequence[LayerSpec], *, family: str, final_norm: NormSpec, **fields: Any
) -> ArchSpec:
    """The model of these layers; one stands for `num_hidden_layers` of it. `fields` are more of `ArchSpec`'s.

    Reads vocab_size and hidden_size, and max_position_embeddings and tie_word_embeddings unless `fields` has
    max_positions and tied_head.
    """
    if isinstance(layers, LayerSpec):
        layers = (layers,) * reader.size("num_hidden_layers")
    if "max_positions" not in fields:
        fields["max_positions"] = reader.size("max_position_embeddings")
    if "tied_head" not in fields:
        fields["tied_head"] = reader.flag("tie_word_embeddings")
    return ArchSpec(
        family=family,
        model_type=reader.config["model_type"],
        vocab_size=reader.size("vocab_size"),
        hidden_size=reader.size("hidden_size"),
        layers=tuple(layers),
        final_norm=final_norm,
        **fields,
    )


def read_attention(reader: ConfigReader, *, rope: RopeSpec | None, **fields: Any) -> AttentionSpec:
    """Attention of the heads that `read_heads` finds; `fields` are more of `AttentionSpec`'s."""
    num_heads, num_kv_heads, head_dim = read_heads(reader)
    return AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, **fields)


def read_gated(reader: ConfigReader, **fields: Any) -> GatedSpec:
    """A gated feed-forward of intermediate_size channels and the activation hidden_act, SiLU if that is absent."""
    return GatedSpec(reader.size("intermediate_size"), read_activation(reader, "silu"), **fields)


def read_head_rope(reader: ConfigReader, **options: Any) -> RopeSpec:
    """The rope of heads as `read_heads` finds them, for max_position_embeddings; `options` are those of `read_rope`."""
    _, _, head_dim = read_heads(reader)
    max_positions = reader.size("max_position_embeddings")
    return read_rope(reader, head_dim=head_dim, max_positions=max_positions, **options)


def read_heads(reader: ConfigReader) -> tuple[int, int, int]:
    """Number of query heads, number of key/value heads (absent: as many), and channels of a head."""
    heads, hidden_size = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads = reader.optional_size("num_key_value_heads") or heads
    head_dim = reader.optional_size("head_dim")
    if heads % kv_heads:
        raise reader.error(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}.")
    if head_dim is None:
        if hidden_size % heads:
            raise reader.error(f"hidden_size = {hidden_size} is not a multiple of num_attention_heads = {heads}.")
        head_dim = hidden_size // heads
    if head_dim % 2:
        raise reader.error(f"head_dim = {head_dim} is odd, and rotary embeddings turn pairs of channels.")
    return heads, kv_heads, head_dim


def read_activation(reader: ConfigReader, default: str, *, key: str = "hidden_act") -> Activation:
    """The activation that `key` names, by Hugging Face's names."""
    name = reader.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise reader.error(f"{key} = {name!r} is not native.", fix=f"Known: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def layer_kinds(
    reader: ConfigReader, default: Sequence[str], *, allowed: Sequence[str] = (SLIDING, FULL)
) -> tuple[str, ...]:
    """The kind of each layer by `layer_types`, or `default` where that is absent; each must be one of `allowed`."""
    kinds = reader.get("layer_types")
    if kinds is None:
        return tuple(default)
    if not isinstance(kinds, list) or len(kinds) != len(default) or not set(map(str, kinds)) <= set(allowed):
        raise reader.error(f"layer_types must name, for each of {len(default)} layers, one of {', '.join(allowed)}.")
    return tuple(map(str, kinds))


def refuse_dropout(reader: ConfigReader, *keys: str) -> None:
    """Refuses dropout inside the model, and weights stored in a format that is not computed.

    Transformers trains with such dropout; Stoker has it in adapters alone.
    """
    for key in keys:
        reader.require(key, 0, fix=f"Set {key} to 0.0 in config.json: Stoker trains without dropout in the model.")
    stored_quantization(reader.config, reader.where)
