"""Arcee's AFM: Llama with a feed-forward that has no gate, and the square of ReLU in it.

Checked against transformers 5.24: `configuration_arcee.py`, `modeling_arcee.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names({**SEPARATE, "feed_forward.up": "mlp.up_proj"})
_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "arcee" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    bias = reader.flag("attention_bias")
    attention = read_attention(reader, rope=read_head_rope(reader), qkv_bias=bias, out_bias=bias)
    activation = read_activation(reader, "relu2")
    feed_forward = PlainSpec(reader.size("intermediate_size"), activation, bias=reader.flag("mlp_bias"))
    return read_decoder(reader, LayerSpec(attention, feed_forward, norm), family="arcee", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
