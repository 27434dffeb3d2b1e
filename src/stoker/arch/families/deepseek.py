"""DeepSeek-V2 and V3: latent attention, dense first layers, then mixtures with shared experts and grouped routing.

A key that is absent has the default that Transformers gives it for that model type; a key whose value Stoker does not
compute is refused. Checked against transformers 5.24: `configuration_*.py` and `modeling_*.py` of the two.
"""

import math
from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_decoder, refuse_dropout
from stoker.arch.families.mixtures import read_auxiliary_loss
from stoker.arch.families.names import SEPARATE, ExpertNames, Held, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import (
    ArchSpec,
    ExpertsSpec,
    GatedSpec,
    LatentAttentionSpec,
    LayerSpec,
    NormSpec,
    RouterSpec,
    WeightEntry,
)

# Transformers builds the latent vectors' norms with its own default, whatever rms_norm_eps says.
_LATENT_NORM = NormSpec(epsilon=1e-6)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "q_lora_rank": 1536,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "tie_word_embeddings": False,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
}
_ATTENTION: Mapping[str, Held] = {
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.query_up": "self_attn.q_b_proj",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.up": "self_attn.kv_b_proj",
}
_EXPERTS: Mapping[str, Held] = {
    "feed_forward.router": "mlp.gate",
    "feed_forward.router.correction": "mlp.gate.e_score_correction_bias",
    "feed_forward.experts.gate_up.weight": ExpertNames(
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), "mlp.experts.gate_up_proj"
    ),
    "feed_forward.experts.down.weight": ExpertNames(("mlp.experts.{}.down_proj.weight",), "mlp.experts.down_proj"),
    "feed_forward.shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "feed_forward.shared.down": "mlp.shared_experts.down_proj",
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "deepseek_v2" or "deepseek_v3" configuration; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    reader = ConfigReader(config, where, _DEFAULTS[model_type])
    refuse_dropout(reader, "attention_dropout")
    reader.require("hidden_act", "silu", fix="Only SwiGLU feed-forwards (silu) are native.")
    reader.require("mlp_bias", False, fix="DeepSeek's feed-forwards have no biases.")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-6))
    attention, dense = _attention(reader, model_type), GatedSpec(reader.size("intermediate_size"))
    experts = _experts(reader, model_type)
    num_dense = reader.get("first_k_dense_replace")
    if not isinstance(num_dense, int) or num_dense < 0:
        raise reader.error(f"first_k_dense_replace = {num_dense!r} is not a number of layers.")
    num_layers = reader.size("num_hidden_layers")
    layers = [LayerSpec(attention, dense if index < num_dense else experts, norm) for index in range(num_layers)]
    return read_decoder(reader, layers, family="deepseek", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    mixer = spec.layers[0].mixer
    straight = isinstance(mixer, LatentAttentionSpec) and mixer.query_rank is None
    down = ("self_attn.q_proj" if straight else "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    return entries(spec, Names({**SEPARATE, **_ATTENTION, **_EXPERTS, "attention.down": down}))


def _attention(reader: ConfigReader, model_type: str) -> LatentAttentionSpec:
    turned, nope = reader.size("qk_rope_head_dim", 64), reader.size("qk_nope_head_dim", 128)
    value, num_heads = reader.size("v_head_dim", 128), reader.size("num_attention_heads")
    if value > turned + nope:
        raise reader.error(f"v_head_dim = {value} is above qk_nope_head_dim + qk_rope_head_dim = {turned + nope}.")
    query_rank, has_bias = reader.optional_size("q_lora_rank"), reader.flag("attention_bias", False)
    if has_bias and query_rank is None:
        raise reader.error("attention_bias = true without q_lora_rank is not native.")
    rope = read_rope(
        reader,
        head_dim=turned,
        max_positions=reader.size("max_position_embeddings"),
        interleaved=model_type == "deepseek_v2" or reader.flag("rope_interleave", True),
    )
    return LatentAttentionSpec(
        num_heads=num_heads,
        query_rank=query_rank,
        latent_rank=reader.size("kv_lora_rank", 512),
        nope_dim=nope,
        value_dim=value,
        rope=rope,
        norm=_LATENT_NORM,
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


def _experts(reader: ConfigReader, model_type: str) -> ExpertsSpec:
    is_v3 = model_type == "deepseek_v3"
    inner = reader.size("moe_intermediate_size")
    method = reader.get("topk_method")
    if not is_v3 and method not in ("greedy", "group_limited_greedy"):
        raise reader.error(f"topk_method = {method!r} is not native.", fix="Known: greedy, group_limited_greedy.")
    groups = reader.optional_size("n_group") or 1 if is_v3 or method == "group_limited_greedy" else 1
    return ExpertsSpec(
        num_experts=reader.size("n_routed_experts"),
        top_k=reader.size("num_experts_per_tok"),
        intermediate_size=inner,
        router=RouterSpec(
            score="sigmoid" if is_v3 else "softmax",
            # V2's own setting of this name does nothing in Transformers.
            normalized=is_v3 and reader.flag("norm_topk_prob", True),
            scale=reader.positive("routed_scaling_factor"),
            groups=groups,
            chosen_groups=reader.optional_size("topk_group") or 1,
            group_top=2 if is_v3 else 1,
            correction=is_v3,
        ),
        shared_size=reader.size("n_shared_experts") * inner,
        auxiliary_loss=0.0 if is_v3 else read_auxiliary_loss(reader),
    )
