"""State-space mixers inside a model: what keeps fp32, what is saved, what a cache holds, what adapters are put on."""

import pytest
import torch

from stoker.adapters.lora import add_lora
from stoker.arch import families, saved
from stoker.arch.saved import Micro
from stoker.models import native
from stoker.plan.adapter import loading_notice, targeted

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_state": 8}
CONFIGS = {
    "mamba": {"model_type": "mamba", **SIZES, "state_size": 8},
    "mamba2": {"model_type": "mamba2", **SIZES, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"model_type": "falcon_h1", **SIZES, **HEADS, "intermediate_size": 48, "mamba_d_ssm": 64},
    "jamba": {
        "model_type": "jamba",
        **SIZES,
        **HEADS,
        "intermediate_size": 48,
        "num_experts": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
}


def spec_of(name):
    return families.read(CONFIGS[name], "config.json")


def short(names):
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_state_spaces_stay_fp32_in_a_model_of_bf16(name):
    model = native.build(spec_of(name), dtype=torch.bfloat16)
    kept = short(name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32)
    assert kept == {"A_log", "D", "dt_bias"}


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_h1"])
def test_saved_bytes_are_what_autograd_keeps(name):
    spec, ids = spec_of(name), torch.randint(0, 40, (2, 64))
    model, kept = native.build(spec), {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    # Besides the blocks: ids, rope tables of 256 positions, the final norm's input and statistic.
    besides = 128 * 8 + (2 * 256 * 4 * 4 if name == "falcon_h1" else 0) + 128 * 32 * 4 + 128 * 4
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - besides
    assert measured == pytest.approx(saved.by_model(spec, Micro(128, 4, is_plain=True)), rel=0.05)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_a_cache_has_one_size_whatever_its_capacity(name):
    model = native.build(spec_of(name))
    small, large = (model.new_cache(capacity=capacity).layers[0] for capacity in (4, 4000))
    assert small.state.shape == large.state.shape
    assert small.window.shape == large.window.shape == (1, 3, small.window.shape[2])
    assert large.state.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mamba", {"in_proj", "x_proj"}),
        ("mamba2", {"in_proj"}),
        ("falcon_h1", {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("jamba", {"in_proj", "x_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_all_linear_is_what_peft_loads(name, expected):
    spec = spec_of(name)
    assert short(targeted(spec, "all-linear")) == expected
    assert set(add_lora(native.build(spec), rank=2, alpha=4).names) == set(targeted(spec, "all-linear"))
    assert loading_notice(spec, "all-linear") == ""


@pytest.mark.parametrize("name", CONFIGS)
def test_an_output_projection_is_adapted_when_named_and_said_not_to_load(name):
    spec = spec_of(name)
    model = native.build(spec)
    assert short(add_lora(model, rank=2, alpha=4, targets=["out_proj"]).names) == {"out_proj"}
    trained = short(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert trained == {"lora_a", "lora_b"}
    notice = loading_notice(spec, ["out_proj"])
    # PEFT loads Jamba's: it refuses by model type.
    assert notice == "" if name == "jamba" else "merge" in notice and "out_proj" in notice


def test_dropout_inside_what_is_run_again_is_the_same_both_times():
    model, ids = native.build(spec_of("mamba"), initializer_range=0.2), torch.randint(0, 40, (2, 16))
    add_lora(model, rank=4, alpha=8, targets=["x_proj"], dropout=0.5)
    weights = torch.randn(2, 16, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss():
        torch.manual_seed(5)
        return (model(ids) * weights).sum()

    gradients, step = torch.autograd.grad(loss(), trained), 1e-3
    direction = [torch.randn_like(parameter) for parameter in trained]
    expected = sum((gradient * way).sum() for gradient, way in zip(gradients, direction, strict=True))
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, way in zip(trained, direction, strict=True):
                parameter.add_(way, alpha=sign * step)
            ends.append(loss())
    # A central difference: with masks of their own in the backward, gradients would be off by their own size.
    assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(expected.item(), rel=0.02)
