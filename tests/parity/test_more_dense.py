"""More dense families against Transformers: one line a variant, all checks of the oracle."""

import pytest
from oracle import CHECKS, every_check, pair
from transformers import (
    CONFIG_MAPPING,
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    HeliumConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from stoker.arch import families

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
MIXED = {**SIZES, "num_hidden_layers": 4, "sliding_window": 8}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
CASES = {
    "stablelm": StableLmConfig(**SIZES, **HALF),
    "stablelm 2 12b": StableLmConfig(**SIZES, **HALF, qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True),
    "olmo": OlmoConfig(**SIZES, clip_qkv=0.5),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(**MIXED),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "smollm3 windows": SmolLM3Config(**MIXED, use_sliding_window=True, no_rope_layer_interval=2, attention_bias=True),
    "granite": GraniteConfig(
        **SIZES, embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.4, attention_multiplier=0.3
    ),
    "cohere": CohereConfig(**SIZES, logit_scale=0.5),
    "cohere plus": CohereConfig(**SIZES, logit_scale=0.5, use_qk_norm=True, attention_bias=True),
    "cohere2": Cohere2Config(**MIXED, logit_scale=0.5),
    "starcoder2": Starcoder2Config(**SIZES, sliding_window=8),
    "exaone4": Exaone4Config(**MIXED, sliding_window_pattern=2),
    "exaone4 whole": Exaone4Config(**SIZES, sliding_window=None, layer_types=["full_attention"] * 2),
    "glm": GlmConfig(**SIZES, **HALF, head_dim=12),
    "glm4": Glm4Config(**SIZES, **HALF, head_dim=8),
    "arcee": ArceeConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "arcee biases": ArceeConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "seed_oss": SeedOssConfig(**SIZES, head_dim=12, attention_dropout=0.0, residual_dropout=0.0),
    "seed_oss biases": SeedOssConfig(**SIZES, head_dim=12, attention_out_bias=True, mlp_bias=True),
    "ernie4_5": Ernie4_5Config(**SIZES, head_dim=12),
    "ernie4_5 biases": Ernie4_5Config(**SIZES, head_dim=8, use_bias=True, tie_word_embeddings=False),
    "helium": HeliumConfig(**SIZES, head_dim=8),
    "helium biases": HeliumConfig(**SIZES, head_dim=8, attention_bias=True, mlp_bias=True),
    "nemotron": NemotronConfig(**SIZES, head_dim=12),
    "nemotron biases": NemotronConfig(**SIZES, attention_bias=True, mlp_bias=True),
}
LATENT = {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.3], "long_factor": [1.5, 3.0]}
NEWER = {
    "internlm3": {"model_type": "internlm3", **SIZES, "head_dim": 12},
    "internlm3 biases": {"model_type": "internlm3", **SIZES, "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "minicpm3": {
        "model_type": "minicpm3",
        **LATENT,
        "scale_emb": 3,
        "dim_model_base": 8,
        # Of the checks, that of generation stays within it: Transformers keeps the keys of the shorter context there.
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32},
    },
    "minicpm3 straight queries": {
        "model_type": "minicpm3",
        **{**LATENT, "q_lora_rank": None, "v_head_dim": None, "scale_depth": None, "dim_model_base": None},
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
}
"""Of classes that came after the oldest Transformers that Stoker runs with."""
CASES |= {
    name: CONFIG_MAPPING[sizes["model_type"]](**sizes)
    for name, sizes in NEWER.items()
    if sizes["model_type"] in CONFIG_MAPPING
}


@pytest.mark.parametrize(("name", "check"), every_check(CASES))
def test_a_family_computes_what_transformers_does(name, check):
    CHECKS[check](pair(CASES[name]))


@pytest.mark.parametrize("kind", sorted({type(config) for config in CASES.values()}, key=lambda kind: kind.__name__))
def test_absent_keys_take_transformers_defaults(kind):
    written = kind().to_dict()
    assert families.read({"model_type": written["model_type"]}, "") == families.read(written, "config.json")
