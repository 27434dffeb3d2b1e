"""State-space models and their hybrids against Transformers on tiny random checkpoints."""

import pytest
from oracle import CHECKS, check_lora, every_check, pair
from transformers import (
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
)

# The recurrence makes sums reorder.
TOLERANCE = 1e-4
SIZES = {"vocab_size": 96, "hidden_size": 32}
STACK = {**SIZES, "num_hidden_layers": 2, "state_size": 4}
HEADS = {**STACK, "num_heads": 8, "head_dim": 8, "chunk_size": 16}
HYBRID = {**SIZES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 4, "mamba_n_groups": 2, "mamba_chunk_size": 16}
SIDE_BY_SIDE = {**HYBRID, **MAMBA2, "num_hidden_layers": 2, "mamba_d_ssm": 48}
GRANITE = {
    **HYBRID,
    **MAMBA2,
    "num_hidden_layers": 3,
    "shared_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 0,
}
CASES = {
    "mamba": MambaConfig(**STACK),
    "mamba with other biases": MambaConfig(
        **STACK, use_bias=True, use_conv_bias=False, tie_word_embeddings=False, time_step_rank=5, conv_kernel=3
    ),
    "falcon_mamba": FalconMambaConfig(**STACK, tie_word_embeddings=False),
    "mamba2": Mamba2Config(**HEADS, n_groups=2),
    "mamba2 with other biases": Mamba2Config(
        **HEADS,
        n_groups=1,
        use_bias=True,
        use_conv_bias=False,
        tie_word_embeddings=True,
        time_step_limit=(0.01, 0.3),
    ),
    "falcon_h1": FalconH1Config(
        **SIDE_BY_SIDE,
        key_multiplier=0.5,
        attention_in_multiplier=0.8,
        attention_out_multiplier=1.2,
        ssm_in_multiplier=1.3,
        ssm_out_multiplier=0.7,
        ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
        mlp_multipliers=[1.5, 0.5],
        embedding_multiplier=2.0,
        lm_head_multiplier=0.5,
    ),
    "falcon_h1 with norm, then gate": FalconH1Config(**SIDE_BY_SIDE, mamba_rms_norm=True),
    "falcon_h1 with gate, then norm": FalconH1Config(
        **SIDE_BY_SIDE, mamba_rms_norm=True, mamba_norm_before_gate=False, attention_bias=True
    ),
    "jamba": JambaConfig(
        **HYBRID, num_hidden_layers=3, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1, num_experts=1
    ),
    "jamba with experts": JambaConfig(
        **HYBRID,
        num_hidden_layers=4,
        mamba_d_state=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        expert_layer_period=3,
        expert_layer_offset=0,
    ),
    "bamba": BambaConfig(**HYBRID, **MAMBA2, num_hidden_layers=3, attn_layer_indices=[1]),
    "nemotron_h": NemotronHConfig(
        **HYBRID,
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=2,
        chunk_size=16,
        layers_block_type=["linear_attention", "mlp", "full_attention"],
    ),
    "granite hybrid": GraniteMoeHybridConfig(
        **GRANITE, embedding_multiplier=2.0, logits_scaling=3.0, residual_multiplier=0.5, attention_multiplier=0.3
    ),
    "granite hybrid with experts": GraniteMoeHybridConfig(
        **{**GRANITE, "num_local_experts": 6, "intermediate_size": 16}, num_experts_per_tok=3, residual_multiplier=0.5
    ),
    "granite hybrid with positions": GraniteMoeHybridConfig(**GRANITE, position_embedding_type="rope"),
}


# These change what is computed and stored, not how it is packed, cached or adapted.
VARIANTS = (
    "mamba with other biases",
    "mamba2 with other biases",
    "falcon_h1 with norm, then gate",
    "falcon_h1 with gate, then norm",
    "jamba",
    "granite hybrid",
    "granite hybrid with positions",
)


@pytest.mark.parametrize(
    ("name", "check"), every_check({name: case for name, case in CASES.items() if name not in VARIANTS})
)
def test_family(name, check):
    CHECKS[check](pair(CASES[name], tolerance=TOLERANCE))


@pytest.mark.parametrize(
    ("name", "check"), every_check({name: CASES[name] for name in VARIANTS}, ["logits", "gradients", "counts"])
)
def test_variant(name, check):
    CHECKS[check](pair(CASES[name], tolerance=TOLERANCE))


def test_peft_loads_an_output_projection_where_it_does_not_refuse_the_model_type():
    check_lora(pair(CASES["jamba"], tolerance=TOLERANCE), targets=["in_proj", "out_proj"])


def test_peft_refuses_an_output_projection_of_the_others():
    # If this no longer raises, `peft_loads_out_proj` and what users are told are out of date.
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        check_lora(pair(CASES["mamba"], tolerance=TOLERANCE), targets=["out_proj"])
