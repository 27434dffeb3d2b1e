"""Adapters of experts: what they start from, what they are, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from stoker.adapters.experts import LoraExperts
from stoker.adapters.lora import add_lora
from stoker.adapters.merge import merge_into
from stoker.errors import ModelError
from stoker.nn.moe import Experts, Router


@pytest.fixture
def model():
    torch.manual_seed(0)
    names = {"experts.gate_up": ("mlp.experts.gate_up_proj",), "experts.down": ("mlp.experts.down_proj",)}
    router = Router(8, 4, top_k=2)
    experts = Experts(8, num_experts=4, intermediate_size=6, router=router, names=names)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return nn.ModuleDict({"feed_forward": experts})


def test_adapters_start_without_effect_and_the_router_has_none(model):
    x = torch.randn(5, 8)
    before = model["feed_forward"](x)
    summary = add_lora(model, rank=3, alpha=6)
    assert summary.names == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert summary.parameters == 4 * 3 * (8 + 12 + 6 + 8)
    assert torch.equal(model["feed_forward"](x), before)
    adapter = model["feed_forward"].experts["gate_up"]
    assert isinstance(adapter, LoraExperts)
    assert adapter.lora_a.abs().max() <= 1 / math.sqrt(8)
    assert not model["feed_forward"].router.weight.requires_grad


def test_merged_weights_compute_what_the_adapter_did(model):
    add_lora(model, rank=3, alpha=6, targets=["experts.down_proj"])
    adapter = model["feed_forward"].experts["down"]
    nn.init.normal_(adapter.lora_b)
    x = torch.randn(5, 8)
    adapted = model["feed_forward"](x)
    assert merge_into(model) == 1
    assert not isinstance(model["feed_forward"].experts["down"], LoraExperts)
    assert torch.allclose(model["feed_forward"](x), adapted, atol=1e-4)


@pytest.mark.parametrize(("options", "what"), [({"dropout": 0.1}, "dropout = 0.1"), ({"dora": True}, "DoRA")])
def test_dropout_and_dora_on_experts_are_refused(model, options, what):
    with pytest.raises(ModelError, match=what):
        add_lora(model, rank=3, alpha=6, **options)
