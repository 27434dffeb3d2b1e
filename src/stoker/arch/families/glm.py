"""GLM-4 ("glm": 9B of 2024; "glm4": 0414): gate and up stored as one, half of each head turned, neighbours together.

"glm4" puts norms before and after each part. Checked against transformers 5.24: the configurations and models of "glm"
and "glm4".
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_JOINED = {**SEPARATE, "feed_forward.gate_up": "mlp.gate_up_proj"}
_SANDWICH = {
    **_JOINED,
    "attention_post_norm": "post_self_attn_layernorm",
    "feed_forward_post_norm": "post_mlp_layernorm",
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "glm" or "glm4" configuration; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    reader = ConfigReader(config, where, {"num_key_value_heads": 2, "head_dim": 128})
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 4096)
    max_positions = reader.size("max_position_embeddings", 131072)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1.5625e-7))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    rope = read_rope(reader, head_dim=head_dim, max_positions=max_positions, partial=0.5, interleaved=True)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            qkv_bias=reader.flag("attention_bias", True),
        ),
        feed_forward=GatedSpec(reader.size("intermediate_size", 13696), read_activation(reader, "silu")),
        norm=norm,
        placement="sandwich" if model_type == "glm4" else "pre",
    )
    return ArchSpec(
        family="glm",
        model_type=model_type,
        vocab_size=reader.size("vocab_size", 151552),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 40),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names(_SANDWICH if spec.model_type == "glm4" else _JOINED))
