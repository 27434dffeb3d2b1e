"""What PEFT will not load of an adapter is said before it is trained."""

import pytest

from stoker.arch import families
from stoker.plan.adapter import loading_notice

LATENT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
HEADS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def notice(targets="all-linear", **config):
    return loading_notice(families.read(config, "config.json"), targets)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_an_adapter_on_experts_and_dense_layers_of_deepseek_is_for_stoker_or_for_merging(model_type):
    sentence = notice(model_type=model_type, **LATENT)
    assert f"in a {model_type} model it takes targets in dense layers or shared experts" in sentence
    assert "merge" in sentence
    # What it advises names no such layer, and says nothing more.
    advised = sentence.partition("targets: [")[2].rstrip("].").split(", ")
    assert {"o_proj", "gate_up_proj", "experts.down_proj"} <= set(advised)
    assert not {"gate_proj", "up_proj", "down_proj"} & set(advised)
    assert notice(advised, model_type=model_type, **LATENT) == ""


def test_without_layers_of_both_kinds_nothing_is_said():
    qwen = {"model_type": "qwen3_moe", **HEADS, "num_experts": 4, "moe_intermediate_size": 16}
    assert notice(**qwen) == ""
    assert "1 more" not in notice(**qwen, mlp_only_layers=[0])
    assert "(model.layers.0.mlp.gate_proj and 2 more)" in notice(**qwen, mlp_only_layers=[0])
    assert notice("all-dense", **qwen, mlp_only_layers=[0]) == ""
    assert notice(model_type="qwen2_moe", **HEADS, num_experts=4) == ""
    assert notice(model_type="llama", **HEADS) == ""
