import pytest
import torch

from stoker.adapters.lora import add_lora, lora_layers
from stoker.adapters.merge import merge_into

VARIANTS = [{}, {"rank_stabilized": True}, {"dora": True}]


@pytest.mark.parametrize("options", VARIANTS)
def test_the_merged_model_answers_like_the_adapted_one(make_model, x, train, options):
    model = make_model()
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, rank=2, alpha=4, targets=["q_proj", "v_proj", "o_proj"], dropout=0.1, **options)
    train(model).eval()
    adapted = model(x)
    assert merge_into(model) == 6
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
    assert not list(lora_layers(model))
    merged = model.state_dict()
    assert merged.keys() == untouched.keys()
    assert not torch.equal(merged["blocks.0.qkv.weight"][:8], untouched["blocks.0.qkv.weight"][:8])
    assert torch.equal(merged["blocks.0.qkv.weight"][8:12], untouched["blocks.0.qkv.weight"][8:12])
    assert torch.equal(merged["blocks.0.qkv.bias"], untouched["blocks.0.qkv.bias"])


def test_a_bf16_weight_is_rounded_once(make_model, train):
    model = make_model(torch.bfloat16)
    add_lora(model, rank=2, alpha=4, targets=["o_proj"])
    layer = train(model).blocks[0].out
    exact = (layer.base.weight.double() + 2.0 * layer.lora_b.double() @ layer.lora_a.double()).bfloat16()
    merge_into(model)
    assert model.blocks[0].out.weight.dtype == torch.bfloat16
    # fp32 sums may fall on the other side of a rounding boundary once in some 2^16 entries; there are 64.
    assert torch.equal(model.blocks[0].out.weight, exact)


def test_a_model_without_adapters_is_left_alone(make_model):
    model = make_model()
    assert merge_into(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())
