"""Mixtures of experts against Transformers on tiny random checkpoints."""

import pytest
import torch
from oracle import CHECKS, check_lora, pair
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from stoker.data.batch import Batch
from stoker.tasks.supervised import SupervisedTask

# Routing makes sums reorder.
TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN = {**SIZES, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
CASES = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, sliding_window=8),
    "qwen2_moe": Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=40),
    "qwen3_moe": Qwen3MoeConfig(**QWEN, head_dim=12, norm_topk_prob=True, mlp_only_layers=[0]),
    "olmoe": OlmoeConfig(**SIZES, intermediate_size=16, num_experts=6, num_experts_per_tok=3, clip_qkv=0.7),
    "granitemoe": GraniteMoeConfig(
        **SIZES,
        intermediate_size=16,
        num_local_experts=6,
        num_experts_per_tok=3,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
    "gpt_oss": GptOssConfig(
        **SIZES,
        head_dim=12,
        intermediate_size=16,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=8,
        swiglu_limit=0.5,
        rope_parameters={**YARN, "truncate": False, "mscale": None, "mscale_all_dim": None},
    ),
    "deepseek_v2": DeepseekV2Config(
        **LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=1.5
    ),
    "deepseek_v2_lite": DeepseekV2Config(**{**LATENT, "q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek_v3": DeepseekV3Config(**LATENT, n_group=4, topk_group=2, rope_parameters=YARN),
}


# PEFT 0.21 takes dense layers' gate_proj, up_proj and down_proj in a model of this kind for those of experts in older
# checkpoints, and then finds no adapter for the former: adapters that hold both are for merging, or for us.
_EXPERTS = ["o_proj", "experts.gate_up_proj", "experts.down_proj"]
PEFT_TARGETS = dict.fromkeys(("qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3"), _EXPERTS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_family(name, check):
    made = pair(CASES[name], tolerance=TOLERANCE)
    if check == "lora":
        check_lora(made, PEFT_TARGETS.get(name, "all-linear"))
    else:
        CHECKS[check](made)


def test_load_balancing_loss_of_a_padded_batch_equals_transformers():
    config = MixtralConfig(
        **SIZES, intermediate_size=24, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.3
    )
    made = pair(config, tolerance=TOLERANCE)
    ids, lengths = made.tokens(2, 20), (20, 13)
    mask = torch.stack([torch.arange(20) < length for length in lengths])
    labels = ids.masked_fill(~mask, -100)
    theirs = made.theirs(ids, attention_mask=mask.long(), labels=labels)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    trained = int((targets != -100).sum())
    batch = Batch(ids, targets, None, sum(lengths), trained, row_tokens=lengths)
    task = SupervisedTask(made.fresh().train())
    result = task(batch)
    assert abs(result.loss_sum / trained - theirs.loss) < 1e-5
    assert abs(result.metrics["balancing_loss"] / trained - 0.3 * theirs.aux_loss) < 1e-5
    made.theirs.zero_grad()
    theirs.loss.backward()
    (result.loss_sum / trained).backward()
    router = task.model.blocks[0].feed_forward.router.weight.grad
    assert (router - made.theirs.model.layers[0].mlp.gate.weight.grad).abs().max() < 1e-6
    made.theirs.zero_grad()
    assert not task.eval()(batch).metrics
