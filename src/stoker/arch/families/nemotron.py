"""Nemotron and Minitron: layer norms stored less one, half of each head turned, the square of ReLU and no gate.

Checked against transformers 5.24: `configuration_nemotron.py`, `modeling_nemotron.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names({**SEPARATE, "feed_forward.up": "mlp.up_proj"})
_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "nemotron" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec("layer", reader.positive("norm_eps"), weight_offset=1.0, bias=True)
    bias, rope = reader.flag("attention_bias"), read_head_rope(reader, partial=0.5)
    activation = read_activation(reader, "relu2")
    layer = LayerSpec(
        mixer=read_attention(reader, rope=rope, qkv_bias=bias, out_bias=bias),
        feed_forward=PlainSpec(reader.size("intermediate_size"), activation, bias=reader.flag("mlp_bias")),
        norm=norm,
    )
    return read_decoder(reader, layer, family="nemotron", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
