"""What a mixture of experts costs: parameters of all experts, work and adapters of those that a token has."""

import pytest

from stoker.arch import activations, arithmetic, families
from stoker.arch.activations import Micro
from stoker.config.load import parse
from stoker.errors import ModelError
from stoker.plan import limits
from stoker.plan.memory import frozen_weight_bytes, scratch_bytes

QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_hidden_layers": 2,
    "head_dim": 128,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}


def spec_of(**changes):
    return families.read({**QWEN, **changes}, "config.json")


def test_all_experts_are_parameters_and_those_chosen_are_work():
    spec = spec_of()
    layer, expert = spec.layers[0], 3 * 2048 * 768
    assert arithmetic.parameters_by_part(spec)["feed_forward"] == 128 * expert + 128 * 2048 + 3 * 2048 * 6144
    flops = arithmetic.layer_flops_per_token(layer, 2048, 1024)
    experts = sum(value for name, value in flops.items() if name.startswith("feed_forward.experts"))
    assert experts == 2 * 8 * expert
    assert flops["feed_forward"] == 2 * 128 * 2048


def test_adapters_of_experts_are_as_many_as_they():
    spec = spec_of()
    assert arithmetic.lora_parameters(spec, 16, ["experts.gate_up_proj"]) == 128 * 16 * (2048 + 1536)
    assert arithmetic.linear_shapes(spec)["model.layers.0.mlp.experts.down_proj"] == (768, 2048)
    assert not any("mlp.gate" in name.rpartition(".")[0] for name in arithmetic.linear_shapes(spec))


def test_experts_are_kept_in_nf4_or_in_the_compute_type():
    spec = spec_of()
    experts = 128 * 3 * 2048 * 768
    dense = frozen_weight_bytes(spec, "none", 2)
    assert frozen_weight_bytes(spec, "nf4", 2) < dense - 1.4 * experts
    assert frozen_weight_bytes(spec, "int8", 2) > dense - experts
    assert scratch_bytes(spec, "nf4", 2) == 2 * 128 * 2048 * 1536


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["adapter.dropout=0.1"], "no dropout, and adapter.dropout is 0.1"),
        (["adapter.kind=dora"], "no DoRA"),
        (["adapter.dropout=0.1", "adapter.targets=[q_proj]"], None),
        ([], None),
    ],
)
def test_dropout_and_dora_on_experts_are_a_problem_before_the_run(overrides, what):
    values = {"model": {"base": "some/model"}, "adapter": {"rank": 4}, "data": {"train": [{"path": "rows.jsonl"}]}}
    config = parse({**values, "train": {"learning_rate": 1e-4}, "output": {"folder": "runs/x"}}, overrides)
    found = [problem.what for path, problem in limits.problems(config, spec_of()) if path == ("adapter",)]
    assert len(found) == (0 if what is None else 1)
    assert what is None or what in found[0]


def test_a_mixture_that_is_run_again_keeps_its_input_beside_the_layer_s():
    spec = spec_of()
    micro = Micro(tokens=8192, value_bytes=2)
    mixture, dense = (activations.op_by_op(layer, 2048, micro, "input") for layer in spec.layers)
    unit = 8192 * 2048 * 2
    assert dense.kept == unit
    assert 2 * unit < mixture.kept < 3 * unit
    # While it runs again: gate and up of eight experts a token, and the gradients of their inputs.
    assert mixture.passing > 8 * 8192 * 2 * (2048 + 3 * 768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux"}, "topk_method"),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.0}, "swiglu_alpha"),
    ],
)
def test_settings_that_are_not_computed_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        spec_of(num_experts_per_tok=8, **changes)
