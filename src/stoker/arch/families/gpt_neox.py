"""GPT-NeoX and Pythia: attention and a plain feed-forward beside each other, each behind a norm, heads partly turned.

Checked against transformers 5.24: `configuration_gpt_neox.py`, `modeling_gpt_neox.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names(
    {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "feed_forward.up": "mlp.dense_h_to_4h",
        "feed_forward.down": "mlp.dense_4h_to_h",
    },
    layer="gpt_neox.layers.{}",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "gpt_neox" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {})
    refuse_dropout(reader, "attention_dropout", "hidden_dropout")
    hidden_size = reader.size("hidden_size", 6144)
    max_positions = reader.size("max_position_embeddings", 2048)
    norm = NormSpec("layer", reader.positive("layer_norm_eps", 1e-5), bias=True)
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size, num_heads=64)
    rope = read_rope(
        reader,
        head_dim=head_dim,
        max_positions=max_positions,
        partial=reader.get("rotary_pct", 0.25),
        theta=reader.get("rotary_emb_base", 10_000.0),
    )
    bias = reader.flag("attention_bias", True)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            qkv_bias=bias,
            out_bias=bias,
            qkv_layout="grouped",
        ),
        feed_forward=PlainSpec(reader.size("intermediate_size", 24576), read_activation(reader, "gelu")),
        norm=norm,
        placement="parallel" if reader.flag("use_parallel_residual", True) else "pre",
    )
    return ArchSpec(
        family="gpt_neox",
        model_type="gpt_neox",
        vocab_size=reader.size("vocab_size", 50432),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 44),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
