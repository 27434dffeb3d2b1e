"""What the families with latent attention share: readings of its settings and the names of its weights."""

import math
from collections.abc import Mapping
from typing import Any

from stoker.arch.families.names import SEPARATE, Held
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, LatentAttentionSpec, NormSpec

DEFAULTS: Mapping[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
}
"""DeepSeek's."""

# Transformers builds the latent vectors' norms with its own default, whatever rms_norm_eps says.
_NORM = NormSpec(epsilon=1e-6)


def read_attention(reader: ConfigReader, *, interleaved: bool) -> LatentAttentionSpec:
    """Latent attention from the usual settings; `interleaved`: neighbouring channels turn together."""
    turned, nope = reader.size("qk_rope_head_dim"), reader.size("qk_nope_head_dim")
    value, num_heads = reader.size("v_head_dim"), reader.size("num_attention_heads")
    if value > turned + nope:
        raise reader.error(f"v_head_dim = {value} is above qk_nope_head_dim + qk_rope_head_dim = {turned + nope}.")
    num_kv_heads = reader.optional_size("num_key_value_heads") or num_heads
    if num_kv_heads != num_heads:
        raise reader.error(
            f"num_key_value_heads = {num_kv_heads}, but all num_attention_heads = {num_heads} have a key of their own."
        )
    query_rank, has_bias = reader.optional_size("q_lora_rank"), reader.flag("attention_bias")
    if has_bias and query_rank is None:
        raise reader.error("attention_bias = true without q_lora_rank is not native.")
    max_positions = reader.size("max_position_embeddings")
    return LatentAttentionSpec(
        num_heads=num_heads,
        query_rank=query_rank,
        latent_rank=reader.size("kv_lora_rank"),
        nope_dim=nope,
        value_dim=value,
        rope=read_rope(reader, head_dim=turned, max_positions=max_positions, interleaved=interleaved),
        norm=_NORM,
        scale=_scale(reader, turned + nope),
        bias=has_bias,
    )


def _scale(reader: ConfigReader, head_dim: int) -> float:
    """Of the scores: YaRN's scaling of all dimensions goes here twice, for queries and for keys."""
    rope = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    all_dims = rope.get("mscale_all_dim") or 0.0
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default" and all_dims
    factor = float(rope.get("factor") or 1.0)
    scale = 0.1 * all_dims * math.log(factor) + 1.0 if is_scaled and factor > 1.0 else 1.0
    return head_dim**-0.5 * scale * scale


def names(spec: ArchSpec) -> dict[str, Held]:
    """Names within a layer, for `families.names.Names`: Llama's with those of latent attention."""
    mixer = spec.layers[0].mixer
    is_straight = isinstance(mixer, LatentAttentionSpec) and mixer.query_rank is None
    return {
        **SEPARATE,
        "attention.down": ("self_attn.q_proj" if is_straight else "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "attention.q_norm": "self_attn.q_a_layernorm",
        "attention.query_up": "self_attn.q_b_proj",
        "attention.kv_norm": "self_attn.kv_a_layernorm",
        "attention.up": "self_attn.kv_b_proj",
    }
