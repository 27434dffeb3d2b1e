"""Settings of state-space models as their files have them."""

import math

import pytest

from stoker.arch import families
from stoker.arch.spec import AttentionSpec, Mamba2Spec, PlainSpec
from stoker.errors import ModelError

NEMOTRON = {"model_type": "nemotron_h", "hidden_size": 32, "intermediate_size": 48, "mamba_num_heads": 8}


def read(**config):
    return families.read(config, "config.json")


def test_an_inner_size_in_the_file_counts_more_than_expand():
    # Falcon-Mamba 7B says expand: 16 beside the inner size that its weights have.
    mixer = read(model_type="falcon_mamba", hidden_size=32, expand=16, intermediate_size=64).layers[0].mixer
    assert mixer.inner_size == 64
    assert read(model_type="mamba", hidden_size=32, expand=4).layers[0].mixer.inner_size == 128


def test_a_model_without_positions_takes_any_length():
    from stoker.plan.limits import max_sequence_length

    assert max_sequence_length(read(model_type="mamba", hidden_size=32)) > 500_000


@pytest.mark.parametrize("upper", [math.inf, "Infinity", {"__float__": "Infinity"}])
def test_an_infinite_limit_of_step_sizes_is_read_in_every_form(upper):
    mixer = read(model_type="mamba2", hidden_size=4096, time_step_limit=[0.25, upper]).layers[0].mixer
    assert mixer.time_step_limit == (0.25, math.inf)


@pytest.mark.parametrize("limit", [[0.1], [1.0, 0.5], [0.0, "wide"], 3])
def test_limits_that_are_no_interval_are_refused(limit):
    with pytest.raises(ModelError, match="time_step_limit"):
        read(model_type="mamba2", time_step_limit=limit)


def test_layers_come_from_a_list_or_from_the_older_letters():
    kinds = ["mamba", "attention", "mlp"]
    by_list = read(**NEMOTRON, layers_block_type=kinds)
    assert by_list == read(**NEMOTRON, hybrid_override_pattern="M*-")
    assert by_list == read(**NEMOTRON, layers_block_type=["linear_attention", "full_attention", "mlp"])
    state_space, attention, plain = by_list.layers
    assert isinstance(state_space.mixer, Mamba2Spec)
    assert isinstance(attention.mixer, AttentionSpec)
    assert attention.mixer.rope is None
    assert plain.mixer is None
    assert plain.feed_forward == PlainSpec(48, "relu_squared", bias=False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**NEMOTRON, "hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
        ({**NEMOTRON, "layers_block_type": ["linear_attention", "moe"]}, "layer 1 is a mixture"),
        ({**NEMOTRON, "layers_block_type": ["lstm"]}, "lstm"),
        ({**NEMOTRON, "layers_block_type": ["mlp"], "mlp_hidden_act": "gelu"}, "mlp_hidden_act"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mamba2", "hidden_size": 32, "num_heads": 3, "head_dim": 7}, "num_heads"),
        ({"model_type": "mamba2", "n_groups": 3}, "n_groups"),
        ({"model_type": "bamba", "mamba_n_heads": 7}, "7 heads"),
        ({"model_type": "bamba", "mamba_d_head": 3}, "mamba_d_head"),
        ({"model_type": "bamba", "z_loss_coefficient": 0.1}, "z_loss"),
        ({"model_type": "falcon_h1", "mlp_multipliers": [1.0]}, "mlp_multipliers"),
        ({"model_type": "falcon_h1", "projectors_bias": True}, "projectors_bias"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"]}, "layer_types has 1"),
        ({"model_type": "jamba", "attn_layer_offset": -1}, "attn_layer_offset"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config, said):
    with pytest.raises(ModelError, match=said):
        read(**config)
