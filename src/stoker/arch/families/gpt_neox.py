"""GPT-NeoX and Pythia: attention and a plain feed-forward beside each other, each behind a norm, heads partly turned.

Checked against transformers 5.24: `configuration_gpt_neox.py`, `modeling_gpt_neox.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

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
_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "use_parallel_residual": True,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000.0,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "gpt_neox" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout", "hidden_dropout")
    norm = NormSpec("layer", reader.positive("layer_norm_eps"), bias=True)
    rope = read_head_rope(reader, partial=reader.get("rotary_pct"), theta=reader.get("rotary_emb_base"))
    bias = reader.flag("attention_bias")
    layer = LayerSpec(
        mixer=read_attention(reader, rope=rope, qkv_bias=bias, out_bias=bias, qkv_layout="grouped"),
        feed_forward=PlainSpec(reader.size("intermediate_size"), read_activation(reader, "gelu")),
        norm=norm,
        placement="parallel" if reader.flag("use_parallel_residual") else "pre",
    )
    return read_decoder(reader, layer, family="gpt_neox", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
