"""A small configuration of every native family, and of its variants that compute or keep other things."""

from dataclasses import replace

from stoker.arch import families
from stoker.arch.spec import ArchSpec, AttentionSpec

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MIXED = SIZES | {"num_hidden_layers": 4, "sliding_window": 16}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
GPT = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
QWEN_MOE = SIZES | {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3}
HYBRID = SIZES
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 32}
STACK = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
SIDE = HYBRID | MAMBA2 | {"mamba_d_ssm": 96}
GRANITE = (
    HYBRID
    | MAMBA2
    | {
        "num_hidden_layers": 3,
        "shared_intermediate_size": 80,
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention", "mamba"],
    }
)
CASES = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 16},
    "llama biases": SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "gemma": SIZES | {"head_dim": 16},
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": MIXED | {"head_dim": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12},
    "phi": SIZES,
    "phi qk": SIZES | {"model_type": "phi", "qk_layernorm": True},
    "phi3": SIZES,
    "falcon": GPT | {"num_kv_heads": 1},
    "falcon 40b": GPT | {"model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon seq": GPT | {"model_type": "falcon", "multi_query": False, "parallel_attn": False, "bias": True},
    "gpt_neox": GPT
    | {
        "intermediate_size": 96,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "gpt_neox seq": GPT
    | {"model_type": "gpt_neox", "intermediate_size": 96, "use_parallel_residual": False, "attention_bias": False},
    "gpt2": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "stablelm": SIZES | HALF,
    "stablelm 12b": SIZES
    | HALF
    | {"model_type": "stablelm", "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    "olmo": SIZES | {"clip_qkv": 0.5},
    "olmo2": SIZES,
    "olmo3": MIXED,
    "smollm3": SIZES | {"no_rope_layer_interval": 2},
    "granite": SIZES | {"residual_multiplier": 0.5},
    "minicpm": SIZES | {"scale_depth": 1.4, "dim_model_base": 8, "scale_emb": 12},
    "cohere": SIZES,
    "cohere plus": SIZES | {"model_type": "cohere", "use_qk_norm": True, "attention_bias": True},
    "cohere2": MIXED,
    "starcoder2": SIZES | {"sliding_window": 16},
    "exaone4": MIXED | {"sliding_window_pattern": 2},
    "glm": SIZES | HALF | {"head_dim": 16},
    "glm4": SIZES | HALF | {"head_dim": 16},
    "internlm2": SIZES | {"bias": False},
    "internlm3": SIZES | {"bias": False, "qkv_bias": False},
    "arcee": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4, "sliding_window": 16},
    "deepseek_v2": LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v2 lite": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None},
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2},
    "gpt_oss": SIZES | {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 16},
    "qwen2_moe": QWEN_MOE | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": QWEN_MOE | {"head_dim": 16},
    "olmoe": SIZES | {"num_experts": 6, "num_experts_per_tok": 3},
    "granitemoe": SIZES | {"num_local_experts": 6, "num_experts_per_tok": 3, "residual_multiplier": 0.5},
    "helium": SIZES | {"head_dim": 16},
    "nemotron": SIZES,
    "seed_oss": SIZES | {"head_dim": 16},
    "ernie4_5": SIZES | {"head_dim": 16},
    "minicpm3": LATENT | {"scale_depth": 1.4, "dim_model_base": 8, "scale_emb": 12},
    "glm4_moe": LATENT | {"head_dim": 16, "num_key_value_heads": 2, "n_group": 4, "topk_group": 2},
    "glm4_moe norms": LATENT
    | {"model_type": "glm4_moe", "head_dim": 16, "num_key_value_heads": 2, "use_qk_norm": True, "attention_bias": True},
    "mamba": STACK,
    "falcon_mamba": STACK | {"tie_word_embeddings": False},
    "mamba2": STACK | {"num_heads": 8, "head_dim": 16, "chunk_size": 32, "n_groups": 2},
    "falcon_h1": SIDE,
    "falcon_h1 scaled": SIDE
    | {
        "model_type": "falcon_h1",
        "mamba_rms_norm": True,
        "key_multiplier": 0.5,
        "attention_in_multiplier": 0.8,
        "attention_out_multiplier": 1.2,
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.7,
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
        "mlp_multipliers": [1.5, 0.5],
    },
    "jamba": HYBRID
    | {
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "expert_layer_period": 3,
        "expert_layer_offset": 0,
    },
    "bamba": HYBRID | MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "nemotron_h": HYBRID
    | {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 32,
        "hybrid_override_pattern": "M-*",
    },
    "granitemoehybrid": GRANITE,
    "granitemoehybrid experts": GRANITE
    | {"model_type": "granitemoehybrid", "num_local_experts": 6, "num_experts_per_tok": 3, "residual_multiplier": 0.5},
}


def spec_of(name: str) -> ArchSpec:
    """The spec of a case, whose name is its model type where its configuration names none."""
    return families.read({"model_type": name} | CASES[name], "config.json")


def as_a_gpu_attends(spec: ArchSpec, **changes: object) -> ArchSpec:
    """The same with attention that keeps and computes what a GPU's does, where a CPU's way is another: for windows,
    soft-caps and sinks it keeps more. `changes` are made besides."""
    plain = {"window": None, "softcap": None, "sinks": False} | changes
    layers = (
        replace(layer, mixer=replace(layer.mixer, **plain)) if isinstance(layer.mixer, AttentionSpec) else layer
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))
