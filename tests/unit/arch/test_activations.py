import random

import pytest

from stoker.arch import activations, arithmetic, saved
from stoker.arch.activations import LADDER, Held, Micro
from stoker.arch.families import read
from stoker.arch.saved import Adapted

MIB = 2**20
# Llama 3.1 8B's layer at 8,192 tokens in a two-byte dtype: the table of kernels/block.py, plus 1 MiB of statistics.
EIGHT_B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
MICRO = Micro(8192, 2)
OF_NORMS = 2 * 4 * 8192  # one fp32 number of each norm


@pytest.fixture
def spec():
    return read(EIGHT_B, "config.json")


@pytest.mark.parametrize(
    ("keep", "mib"), [("all", 64 + 96 + 64 + 64 + 448), ("mixer", 64 + 96 + 64 + 64), ("attention", 128), ("input", 64)]
)
def test_each_rung_keeps_what_the_layer_kernel_says(spec, keep, mib):
    statistics = 0 if keep == "input" else 1
    assert activations.fused(spec.layers[0], 4096, MICRO, keep).kept == (mib + statistics) * MIB + OF_NORMS


def test_what_waits_on_the_host_leaves_the_device(spec):
    for keep in LADDER:
        here = activations.fused(spec.layers[0], 4096, MICRO, keep)
        away = activations.fused(spec.layers[0], 4096, MICRO, keep, offload=True)
        assert away.kept + away.host == here.kept
        assert away.passing > here.passing
    assert activations.fused(spec.layers[0], 4096, MICRO, "attention", offload=True).kept == OF_NORMS


def test_queries_keys_and_values_are_back_from_the_host_during_attentions_backward(spec):
    layer, heads = spec.layers[0], 6144 * 8192 * 2
    for keep, brought in (("all", heads), ("mixer", heads), ("attention", 0)):
        # One token a tile: the feed-forward's moment is low, attention's the highest.
        here = activations.fused(layer, 4096, MICRO, keep, tile_tokens=1)
        away = activations.fused(layer, 4096, MICRO, keep, tile_tokens=1, offload=True)
        assert away.passing - here.passing == brought + away.leaving


def test_tiles_hold_a_tiles_gate_up_and_activation_instead_of_all(spec):
    layer, micro = spec.layers[0], Micro(32768, 2)
    for keep in ("mixer", "attention", "input"):
        whole = activations.fused(layer, 4096, micro, keep)
        tiled = activations.fused(layer, 4096, micro, keep, tile_tokens=8192)
        # Gate, up, the activation, the normed rows and their gradient, until attention's backward is what peaks.
        spared = (3 * 14336 + 2 * 4096) * (32768 - 8192) * 2
        assert 0.7 * spared < whole.passing - tiled.passing <= spared
        assert tiled.kept == whole.kept
    assert activations.fused(layer, 4096, micro, "all", tile_tokens=8192) == activations.fused(
        layer, 4096, micro, "all"
    )


def test_however_small_the_tiles_attention_needs_its_own(spec):
    # Its backward sums the gradient of q, 4096 channels, in fp32, beside 3 D and twice q, k and v in bf16.
    least = (3 * 4096 + 2 * 6144) * 8192 * 2 + 4 * 4096 * 8192
    assert activations.fused(spec.layers[0], 4096, MICRO, "attention", tile_tokens=1).passing == least


def test_where_keys_are_copied_for_every_query_head_attention_needs_more(spec):
    flash = activations.fused(spec.layers[0], 4096, Micro(8192, 2, head_copies=2), "attention", tile_tokens=1)
    cudnn = activations.fused(spec.layers[0], 4096, MICRO, "attention", tile_tokens=1)
    assert flash.passing - cudnn.passing == 2 * 4096 * 8192 * 2


def test_the_peak_is_where_a_layer_and_those_before_it_hold_most():
    assert activations.peak([]) == 0
    assert activations.peak([(Held(10, 5), 2)]) == activations.peak([(Held(10, 5), 1), (Held(10, 5), 1)]) == 25
    # The first layer's backward needs much, but by then the second has let go of what it kept.
    assert activations.peak([(Held(1, 20), 1), (Held(10, 5), 1)]) == 21


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_with_gradients_that_arrive_is_the_highest_moment_of_the_backward(seed):
    draw = random.Random(seed)
    kinds = [Held(draw.randrange(100), draw.randrange(100), arriving=draw.randrange(100)) for _ in range(3)]
    runs = [(kind, draw.randrange(1, 4)) for kind in kinds]
    layers = [kind for kind, count in runs for _ in range(count)]
    # Every moment of a backward, one by one: what is there when a layer's own gradients are.
    held, gradients, moments = sum(layer.kept for layer in layers), 0, []
    for layer in reversed(layers):
        gradients += layer.arriving
        moments.append(held + layer.passing + gradients)
        held -= layer.kept
    assert held == 0
    assert activations.peak(runs) + gradients == max(moments)


def test_the_gradients_of_a_layer_are_those_of_its_weights(spec):
    layer = spec.layers[0]
    weights = 4096 * (6144 + 4096) + 3 * 4096 * 14336
    assert activations.arriving(layer, 4096, Micro(8192, 2, gradient_bytes=2)) == 2 * weights
    assert activations.arriving(layer, 4096, MICRO) == 0


def test_the_gradients_of_a_layers_adapters_are_those_of_a_and_b(spec):
    rank, targets = 16, ("q_proj", "down_proj")
    names = [name for name in arithmetic.linear_shapes(spec) if name.endswith(targets)]
    parameters = arithmetic.adapter_parameters_by_linear(spec, rank, names)
    assert dict(parameters) == {"attention.qkv": rank * 2 * 4096, "feed_forward.down": rank * (14336 + 4096)}
    assert 32 * sum(dict(parameters).values()) == arithmetic.lora_parameters(spec, rank, targets)
    micro = Micro(8192, 2, gradient_bytes=4, adapter=Adapted((), parameters=parameters))
    assert activations.arriving(spec.layers[0], 4096, micro) == 4 * sum(dict(parameters).values())


def test_experts_adapters_count_for_every_expert():
    spec = read(MIXTURE, "config.json")
    names = [name for name in arithmetic.linear_shapes(spec) if "experts" in name]
    parameters = dict(arithmetic.adapter_parameters_by_linear(spec, 4, names))
    each = {"feed_forward.experts.gate_up": 32 + 2 * 16, "feed_forward.experts.down": 16 + 32}
    assert parameters == {name: 4 * 8 * size for name, size in each.items()}


def test_op_by_op_a_layer_keeps_its_input_or_everything(spec):
    layer = spec.layers[0]
    whole = activations.op_by_op(layer, 4096, MICRO, "all")
    assert whole.kept == saved.by_layer(layer, 4096, MICRO)
    checkpointed = activations.op_by_op(layer, 4096, MICRO, "input")
    assert checkpointed.kept == 64 * MIB
    assert checkpointed.passing == whole.kept + whole.passing


def test_lower_rungs_run_more_again_and_the_layer_kernel_never_the_last_matmul(spec):
    again = [activations.recomputed_flops_per_token(spec, 4096, [keep] * 32, is_fused=True) for keep in LADDER]
    assert again[0] == 0
    assert again == sorted(again)
    forward = arithmetic.flops_per_token(spec, 4096) - 2 * 4096 * 128256
    assert again[-1] == forward - 32 * 2 * 4096 * 14336
    assert (
        activations.recomputed_flops_per_token(spec, 4096, ["input"] * 32, is_fused=False) == again[-1]
    )  # nor does autograd


MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MAMBA = {"model_type": "mamba", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "time_step_rank": 4}


@pytest.mark.parametrize(
    ("config", "rungs"), [(MIXTURE, ["all", "attention", "input"]), (MAMBA, ["all", "mixer", "input"])]
)
def test_mixtures_and_mamba_have_a_rung_between_op_by_op(config, rungs):
    (layer,) = read(config, "config.json").layers
    assert list(activations.op_by_op_rungs(layer)) == rungs
    asked = {rung: activations.legal((layer,), (rung,), is_fused=False)[0] for rung in activations.LADDER}
    assert set(asked.values()) == set(rungs)
    assert all(asked[rung] == rung for rung in rungs)
    micro = activations.Micro(64, 2)
    kept = [activations.op_by_op(layer, 32, micro, rung).kept for rung in rungs]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
    again = [set(activations.run_again(layer, 32, rung, is_fused=False)) for rung in rungs]
    assert not again[0]
    assert again[0] < again[1] < again[2]
    assert not any(name.startswith("feed_forward") for name in again[2])


def test_a_mixture_that_keeps_attention_holds_its_result_and_a_number_a_head():
    (layer,) = read(MIXTURE, "config.json").layers
    kept = {
        rung: activations.op_by_op(layer, 32, activations.Micro(64, 2), rung).kept for rung in ("attention", "input")
    }
    assert kept["attention"] - kept["input"] == 64 * (32 * 2 + 4 * 4)
