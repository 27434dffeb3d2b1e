"""Arcee's AFM: Llama with a feed-forward that has no gate, and the square of ReLU in it.

Checked against transformers 5.24: `configuration_arcee.py`, `modeling_arcee.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names({**SEPARATE, "feed_forward.up": "mlp.up_proj"})


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of an "arcee" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {})
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 2560)
    max_positions = reader.size("max_position_embeddings", 4096)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-5))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    bias = reader.flag("attention_bias", False)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=read_rope(reader, head_dim=head_dim, max_positions=max_positions),
            qkv_bias=bias,
            out_bias=bias,
        ),
        feed_forward=PlainSpec(
            reader.size("intermediate_size", 18432),
            read_activation(reader, "relu2"),
            bias=reader.flag("mlp_bias", False),
        ),
        norm=norm,
    )
    return ArchSpec(
        family="arcee",
        model_type="arcee",
        vocab_size=reader.size("vocab_size", 32000),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 32),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
