"""GLM-4.5 and 4.6: half of each head turned, dense first layers, then mixtures routed as DeepSeek-V3's.

The larger models norm each head of queries and keys. Checked against transformers 5.24: `configuration_glm4_moe.py`,
`modeling_glm4_moe.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import deepseek
from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_NAMES = Names({**SEPARATE, **deepseek.EXPERT_NAMES})
_DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_qk_norm": False,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "glm4_moe" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    reader.require("hidden_act", "silu", fix="Only SwiGLU feed-forwards (silu) are native.")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    attention = read_attention(
        reader,
        rope=read_head_rope(reader, partial=0.5),
        qkv_bias=reader.flag("attention_bias"),
        qk_norm=norm if reader.flag("use_qk_norm") else None,
    )
    parts = deepseek.dense_first(reader, read_gated(reader), deepseek.sigmoid_experts(reader))
    layers, later = [LayerSpec(attention, part, norm) for part in parts], deepseek.later_layers(reader)
    return read_decoder(reader, layers, family="glm4_moe", final_norm=norm, left_out=later.left_out, unused=later.names)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
