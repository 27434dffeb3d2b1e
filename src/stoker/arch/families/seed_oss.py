"""Seed-OSS: Llama's layers with heads wider than the hidden size, and biased queries, keys and values.

Checked against transformers 5.24: `configuration_seed_oss.py`, `modeling_seed_oss.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "seed_oss" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    layer = LayerSpec(
        mixer=read_attention(
            reader,
            rope=read_head_rope(reader),
            qkv_bias=reader.flag("attention_bias"),
            out_bias=reader.flag("attention_out_bias"),
        ),
        feed_forward=read_gated(reader, bias=reader.flag("mlp_bias")),
        norm=norm,
    )
    left_out = reader.left_out("attention_dropout", "residual_dropout")
    return read_decoder(reader, layer, family="seed_oss", final_norm=norm, left_out=left_out)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())
