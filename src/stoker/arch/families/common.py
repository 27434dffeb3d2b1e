"""Settings that many families share in `config.json`: heads, activations, windows by layer, and what is refused."""

from collections.abc import Sequence

from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import Activation

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


def read_heads(
    reader: ConfigReader,
    hidden_size: int,
    *,
    num_heads: int = 32,
    heads_key: str = "num_attention_heads",
    kv_heads_key: str = "num_key_value_heads",
) -> tuple[int, int, int]:
    """Number of query heads, number of key/value heads, and channels of a head; `num_heads` if the key is absent."""
    heads = reader.size(heads_key, num_heads)
    kv_heads = reader.optional_size(kv_heads_key) or heads
    head_dim = reader.optional_size("head_dim")
    if heads % kv_heads:
        raise reader.error(f"{heads_key} = {heads} is not a multiple of {kv_heads_key} = {kv_heads}.")
    if head_dim is None:
        if hidden_size % heads:
            raise reader.error(f"hidden_size = {hidden_size} is not a multiple of {heads_key} = {heads}.")
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
    reader: ConfigReader, num_layers: int, allowed: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    """The kind of each layer by `layer_types`, or `default` where that is absent; each must be one of `allowed`."""
    kinds = reader.get("layer_types")
    if kinds is None:
        return tuple(default)
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(map(str, kinds)) <= set(allowed):
        raise reader.error(f"layer_types must name, for each of {num_layers} layers, one of {', '.join(allowed)}.")
    return tuple(map(str, kinds))


def refuse_dropout(reader: ConfigReader, *keys: str) -> None:
    """Refuses dropout inside the model, and weights stored in a format that is not computed.

    Transformers trains with such dropout; Stoker has it in adapters alone.
    """
    for key in keys:
        reader.require(key, 0, fix=f"Set {key} to 0.0 in config.json: Stoker trains without dropout in the model.")
    stored_quantization(reader.config, reader.where)
