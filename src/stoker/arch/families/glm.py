"""GLM-4 ("glm": 9B of 2024; "glm4": 0414): gate and up stored as one, half of each head turned, neighbours together.

"glm4" puts norms before and after each part. Checked against transformers 5.24: the configurations and models of "glm"
and "glm4".
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_JOINED = {**SEPARATE, "feed_forward.gate_up": "mlp.gate_up_proj"}
_SANDWICH = {
    **_JOINED,
    "attention_post_norm": "post_self_attn_layernorm",
    "feed_forward_post_norm": "post_mlp_layernorm",
}
_DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "tie_word_embeddings": False,
    "attention_bias": True,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "glm" or "glm4" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    rope = read_head_rope(reader, partial=0.5, interleaved=True)
    layer = LayerSpec(
        mixer=read_attention(reader, rope=rope, qkv_bias=reader.flag("attention_bias")),
        feed_forward=read_gated(reader),
        norm=norm,
        placement="sandwich" if config["model_type"] == "glm4" else "pre",
    )
    return read_decoder(reader, layer, family="glm", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names(_SANDWICH if spec.model_type == "glm4" else _JOINED))
