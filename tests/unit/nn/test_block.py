"""What a layer with a mixture of experts keeps for the backward, and what it runs again there."""

import gc
import weakref

import pytest
import torch

from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.models import native

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def model():
    model = native.build(read(CONFIG, "config.json"), seed=3).train()
    add_lora(model, rank=2, alpha=4)
    return model


@pytest.mark.parametrize(("keep_attention", "again"), [(True, {"qkv": 1, "out": 0}), (False, {"qkv": 1, "out": 1})])
def test_the_output_projection_is_run_again_only_where_its_input_is_gone(model, keep_attention, again):
    block = model.blocks[0]
    block.recompute, block.keep_attention = True, keep_attention
    calls = []
    for name in again:
        getattr(block.attention, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    loss = model(torch.arange(16)[None]).square().mean()
    calls.clear()
    loss.backward()
    assert {name: calls.count(name) for name in again} == again


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "is_kept"), [(True, False), (False, True)])
def test_what_goes_into_the_experts_is_made_again(model, recompute, is_kept):
    block = model.blocks[0]
    block.recompute = recompute
    seen = []
    block.feed_forward.register_forward_pre_hook(
        lambda _, inputs: seen.append(weakref.ref(inputs[0].untyped_storage()))
    )
    loss = model(torch.arange(16)[None]).square().mean()
    gc.collect()
    assert (seen[0]() is not None) == is_kept
    loss.backward()
