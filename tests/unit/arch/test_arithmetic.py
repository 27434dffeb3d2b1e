import pytest

from stoker.arch import arithmetic, saved
from stoker.arch.families import read
from stoker.arch.saved import Micro
from stoker.models import native

SIZES = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def spec(**changes):
    return read(SIZES | changes, "config.json")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 6}]
)
def test_parameters_are_those_of_the_model_that_is_built(changes):
    model = native.build(spec(**changes))
    assert arithmetic.num_parameters(spec(**changes)) == sum(p.numel() for p in model.parameters())
    parts = arithmetic.parameters_by_part(spec(**changes))
    assert parts["feed_forward"] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".feed_forward." in name
    )
    assert parts["norms"] == sum(p.numel() for name, p in model.named_parameters() if "norm." in name)


def test_llama_2_7b_has_its_published_size():
    assert arithmetic.num_parameters(read({"model_type": "llama"}, "")) == 6_738_415_616


def test_lora_counts_both_factors_of_each_target():
    assert arithmetic.lora_parameters(spec(), 4, ["q_proj"]) == 3 * 4 * (16 + 16)
    assert arithmetic.lora_parameters(spec(), 4, ["k_proj", "down_proj"]) == 3 * 4 * ((16 + 8) + (24 + 16))
    assert arithmetic.lora_parameters(spec(), 2, ["model.layers.1.mlp.up_proj"]) == 2 * (16 + 24)
    assert arithmetic.lora_parameters(spec(), 4, ["proj"]) == 0
    every = sum(i + o for i, o in [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)])
    assert arithmetic.lora_parameters(spec(), 4) == 3 * 4 * every


def test_flops_are_two_a_weight_and_grow_with_what_is_attended():
    weights = arithmetic.num_parameters(spec()) - 50 * 16 - arithmetic.parameters_by_part(spec())["norms"]
    one = arithmetic.flops_per_token(spec(), 1)
    assert one == 2 * weights + 3 * 4 * 16  # a single position attends to itself
    # 9 positions see 5 keys on average.
    assert arithmetic.flops_per_token(spec(), 9) - one == 3 * 4 * 16 * 4


def test_a_window_bounds_what_is_attended():
    windowed = spec(model_type="mistral", sliding_window=4)
    growth = arithmetic.flops_per_token(windowed, 10_000) - arithmetic.flops_per_token(windowed, 1)
    assert growth == pytest.approx(3 * 4 * 16 * 3, rel=1e-3)


def test_training_costs_three_forwards_less_what_a_frozen_base_spares():
    forward = arithmetic.flops_per_token(spec(), 9)
    assert arithmetic.training_flops_per_token(spec(), 9, frozen_base=False) == 3 * forward
    frozen = arithmetic.training_flops_per_token(spec(), 9, frozen_base=True)
    assert 2 * forward < frozen < 3 * forward


def test_saved_bytes_are_what_autograd_keeps():
    import torch

    model = native.build(spec())
    ids = torch.randint(0, 50, (2, 12))
    kept = {}

    def pack(tensor):
        if not any(tensor.data_ptr() == p.data_ptr() for p in model.parameters()):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(ids)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    predicted = saved.by_model(spec(), Micro(24, 4, is_plain=True))
    assert hidden.requires_grad
    # Besides the blocks: ids, rope tables of 256 positions, the final norm's input and statistic.
    assert measured - 24 * 8 - 2 * 256 * 2 * 4 - 24 * 16 * 4 - 24 * 4 == pytest.approx(predicted, abs=24 * 4 * 4)


def test_the_parts_of_layers_and_the_head_make_up_the_forward():
    parts = [arithmetic.layer_flops_per_token(layer, 16, 9) for layer in spec().layers]
    assert sum(sum(part.values()) for part in parts) + 2 * 50 * 16 == arithmetic.flops_per_token(spec(), 9)
