"""StarCoder2: layer norms, biases, a feed-forward without a gate, a sliding window.

Checked against transformers 5.24: `configuration_starcoder2.py`, `modeling_starcoder2.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names({**SEPARATE, "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"})
_DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": True,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "starcoder2" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader)
    norm = NormSpec("layer", reader.positive("norm_epsilon"), bias=True)
    bias, window = reader.flag("use_bias"), reader.optional_size("sliding_window")
    attention = read_attention(reader, rope=read_head_rope(reader), qkv_bias=bias, out_bias=bias, window=window)
    feed_forward = PlainSpec(reader.size("intermediate_size"), read_activation(reader, "gelu_pytorch_tanh"), bias)
    return read_decoder(
        reader,
        LayerSpec(attention, feed_forward, norm),
        family="starcoder2",
        final_norm=norm,
        left_out=reader.left_out("attention_dropout", "residual_dropout", "embedding_dropout"),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
