"""Helium: Llama's layers, with neighbouring channels of a head turned together.

Checked against transformers 5.24: `configuration_helium.py`, `modeling_helium.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS = {
    "vocab_size": 48000,
    "hidden_size": 2560,
    "intermediate_size": 7040,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-8,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "helium" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    rope = read_head_rope(reader, theta=100_000.0, interleaved=True)
    attention = read_attention(reader, rope=rope, qkv_bias=reader.flag("attention_bias"))
    width, hidden_size = attention.num_heads * attention.head_dim, reader.size("hidden_size")
    if width != hidden_size:
        raise reader.error(f"{width} channels of all heads together are not hidden_size = {hidden_size}.")
    layer = LayerSpec(attention, read_gated(reader, bias=reader.flag("mlp_bias")), norm)
    return read_decoder(reader, layer, family="helium", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())
