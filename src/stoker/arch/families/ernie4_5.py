"""ERNIE 4.5 (dense): Llama's layers, with neighbouring channels of a head turned together.

Checked against transformers 5.24: `configuration_ernie4_5.py`, `modeling_ernie4_5.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": False,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "ernie4_5" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    bias, rope = reader.flag("use_bias"), read_head_rope(reader, theta=500_000.0, interleaved=True)
    attention = read_attention(reader, rope=rope, qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(attention, read_gated(reader, bias=bias), norm)
    return read_decoder(reader, layer, family="ernie4_5", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())
