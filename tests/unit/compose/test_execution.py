"""The plan's choices on a live model."""

from dataclasses import replace

import pytest
import torch

from stoker.adapters.fused_block import FusedBlock, why_not_fused
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.compose.execution import set_up_layers
from stoker.config.load import parse
from stoker.models import native
from stoker.nn.block import Block
from stoker.plan import execution
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPEC = read(CONFIG, "config.json")


@pytest.fixture
def plan():
    values = {
        "model": {"base": "m"},
        "adapter": {"rank": 2},
        "data": {"train": [{"path": "x"}], "sequence_length": 16},
        "train": {"learning_rate": 1e-3},
        "output": {"folder": "r"},
    }
    chosen = choose(parse(values), SPEC, Hardware((Device("cpu", "CPU", 2**33),)))
    return lambda **changes: replace(chosen, **changes)


@pytest.fixture
def decoder():
    model = native.build(SPEC)
    add_lora(model, rank=2, alpha=4)
    return model


def gradients(decoder):
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    return torch.autograd.grad(decoder(ids).square().sum(), trained)


def test_each_layer_gets_its_rung(decoder, plan):
    expected = gradients(decoder)
    keep = ("attention", "mixer", "all")
    set_up_layers(decoder, plan(layers="fused", keep=keep))
    assert [block.options.keep for block in decoder.blocks] == list(keep)
    torch.testing.assert_close(gradients(decoder), expected, rtol=1e-4, atol=1e-5)  # fp32, sums in another order


def test_op_by_op_layers_recompute_where_they_keep_their_input(decoder, plan):
    expected = gradients(decoder)
    set_up_layers(decoder, plan(layers="op by op", keep=("input", "all", "all")))
    assert [block.recompute for block in decoder.blocks] == [True, False, False]
    assert all(map(torch.equal, gradients(decoder), expected))


def test_offloaded_layers_share_one_place_on_the_host(decoder, plan):
    expected = gradients(decoder)
    offload = set_up_layers(decoder, plan(layers="fused", keep=("attention",) * 3, offload_activations=True))
    assert {id(block.options.offload) for block in decoder.blocks} == {id(offload)}
    torch.testing.assert_close(gradients(decoder), expected, rtol=1e-4, atol=1e-5)
    assert offload.num_stored == 0


def test_what_an_earlier_run_set_is_undone(decoder, plan):
    names = [name for name, _ in decoder.named_parameters()]
    expected = gradients(decoder)
    set_up_layers(decoder, plan(layers="fused", keep=("input",) * 3))
    assert all(isinstance(block, FusedBlock) for block in decoder.blocks)
    set_up_layers(decoder, plan(layers="op by op", keep=("all",) * 3))
    assert all(type(block) is Block and not block.recompute for block in decoder.blocks)
    assert [name for name, _ in decoder.named_parameters()] == names
    assert all(map(torch.equal, gradients(decoder), expected))


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"kind": "dora"}, {"rank_stabilized": True}])
def test_plan_and_layer_kernel_agree_on_what_runs_op_by_op(changes):
    values = {
        "model": {"base": "m"},
        "adapter": {"rank": 2, **changes},
        "data": {"train": [{"path": "x"}]},
        "train": {"learning_rate": 1e-3},
        "output": {"folder": "r"},
    }
    adapter = parse(values).adapter
    model = native.build(SPEC)
    add_lora(model, rank=2, alpha=4, dropout=adapter.dropout, dora=adapter.kind == "dora")
    assert bool(execution.why_op_by_op(adapter)) == (why_not_fused(model) is not None)
