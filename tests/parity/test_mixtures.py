"""Mixtures of experts against Transformers on tiny random checkpoints."""

import shutil

import pytest
import torch
from oracle import CHECKS, assert_close, check_lora, every_check, pair
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from stoker.adapters.lora import add_lora, linear_shapes
from stoker.arch import families
from stoker.data.batch import Batch
from stoker.errors import ModelError
from stoker.export import adapter, merged
from stoker.models import native
from stoker.models.folder import read_config
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
GLM = {
    **SIZES,
    "head_dim": 12,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
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
    "glm4_moe": Glm4MoeConfig(**GLM, routed_scaling_factor=1.5),
    "glm4_moe groups": Glm4MoeConfig(**GLM, n_group=4, topk_group=2, use_qk_norm=True, attention_bias=True),
}


# PEFT 0.21 takes dense layers' gate_proj, up_proj and down_proj in a model of this kind for those of experts in older
# checkpoints, and then finds no adapter for the former: adapters that hold both are for merging, or for us.
_EXPERTS = ["o_proj", "experts.gate_up_proj", "experts.down_proj"]
PEFT_TARGETS = dict.fromkeys(
    ("qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "glm4_moe", "glm4_moe groups"), _EXPERTS
)


@pytest.mark.parametrize(("name", "check"), every_check(CASES))
def test_family(name, check):
    made = pair(CASES[name], tolerance=TOLERANCE)
    if check == "lora":
        check_lora(made, PEFT_TARGETS.get(name, "all-linear"))
    else:
        CHECKS[check](made)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_later_tokens_are_left_aside_and_said_to_be(name, tmp_path):
    made = pair(CASES[name], tolerance=TOLERANCE)
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.{len(made.spec.layers)}.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = native.load(tmp_path, families.read(read_config(tmp_path), str(tmp_path)))
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), made.ours.parameters(), strict=True))
    assert made.spec.left_out == ("num_nextn_predict_layers = 1",)
    tensors[f"model.layers.{len(made.spec.layers) + 1}.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not part of this architecture"):
        native.load(tmp_path, made.spec)


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


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_merged_model_is_base_and_adapter_in_transformers(name, tmp_path):
    made = pair(CASES[name], tolerance=TOLERANCE)
    model = made.fresh()
    add_lora(model, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    adapter.save(model, tmp_path / "adapter", base_name=str(made.folder))
    report = merged.merge(made.folder, tmp_path / "adapter", tmp_path / "merged")
    assert report.num_layers == len(linear_shapes(made.ours))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    ids = made.tokens(2, 16)
    with torch.no_grad():
        assert_close(model.logits(model(ids)), loaded(ids, use_cache=False).logits, TOLERANCE)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_recomputed_layers_have_the_same_gradients(name):
    gradients = []
    for recompute, keep_attention in ((False, False), (True, False), (True, True)):
        model = pair(CASES[name], tolerance=TOLERANCE).fresh().train()
        add_lora(model, rank=2, alpha=4)
        for block in model.blocks:
            block.recompute, block.keep_attention = recompute, keep_attention
        model(torch.arange(5, 25)[None]).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    # A and B of qkv, out, gate_up and down, and of the shared expert's two.
    assert len(gradients[0]) == 2 * len(model.blocks) * (6 if name == "qwen2_moe" else 4)
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))
