"""StarCoder2: layer norms, biases, a feed-forward without a gate, a sliding window.

Checked against transformers 5.24: `configuration_starcoder2.py`, `modeling_starcoder2.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names({**SEPARATE, "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"})


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "starcoder2" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {"num_attention_heads": 24, "num_key_value_heads": 2})
    refuse_dropout(reader)
    hidden_size = reader.size("hidden_size", 3072)
    max_positions = reader.size("max_position_embeddings", 4096)
    norm = NormSpec("layer", reader.positive("norm_epsilon", 1e-5), bias=True)
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    bias = reader.flag("use_bias", True)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=read_rope(reader, head_dim=head_dim, max_positions=max_positions),
            qkv_bias=bias,
            out_bias=bias,
            window=reader.optional_size("sliding_window"),
        ),
        feed_forward=PlainSpec(
            reader.size("intermediate_size", 12288), read_activation(reader, "gelu_pytorch_tanh"), bias=bias
        ),
        norm=norm,
    )
    return ArchSpec(
        family="starcoder2",
        model_type="starcoder2",
        vocab_size=reader.size("vocab_size", 49152),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 30),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", True),
        left_out=reader.left_out("attention_dropout", "residual_dropout", "embedding_dropout"),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
