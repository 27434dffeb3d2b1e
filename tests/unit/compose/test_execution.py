"""The plan's choices on a live model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stoker.adapters.fused_block import FusedBlock, freeze_into, why_not_fused
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.compose.execution import fp8_notice, layers_not_in_fp8, set_up_layers, set_up_weights, warm_up_reason
from stoker.compose.vocabulary import grow
from stoker.config.load import parse
from stoker.models import native
from stoker.nn.block import Block
from stoker.plan import execution
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware
from stoker.quant.fp8 import Fp8Weight
from stoker.tasks.supervised import SupervisedTask

CONFIG = {
    "model_type": "llama",
    "vocab_size": 48,
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


def test_a_mixture_among_layers_of_the_layer_kernel_keeps_attention_too(plan):
    config = {**CONFIG, "model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 4, "mlp_only_layers": [0]}
    model = native.build(read({**config, "num_experts_per_tok": 2, "head_dim": 4}, "config.json"))
    add_lora(model, rank=2, alpha=4)
    expected = gradients(model)
    set_up_layers(model, plan(layers="fused", keep=("mixer", "attention", "input")))
    fused, *others = model.blocks
    assert isinstance(fused, FusedBlock)
    assert [(block.recompute, block.keep_attention) for block in others] == [(True, True), (True, False)]
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)  # fp32, sums in another order


def test_a_mixture_keeps_attention_and_mamba_all_where_kernels_hold_little(plan):
    mixture = {**CONFIG, "model_type": "mixtral", "num_local_experts": 4}
    decoder = native.build(read(mixture, "config.json"))
    for rung, expected in (("attention", (True, True)), ("input", (True, False)), ("all", (False, False))):
        set_up_layers(decoder, plan(layers="op by op", keep=(rung,) * 3))
        assert {(block.recompute, block.keep_attention) for block in decoder.blocks} == {expected}
    mamba = {"model_type": "mamba", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "time_step_rank": 2}
    decoder = native.build(read(mamba, "config.json"))
    for kernels, rung, expected in (("triton", "all", True), ("triton", "mixer", False), ("reference", "all", False)):
        set_up_layers(decoder, plan(layers="op by op", kernels=kernels, keep=(rung,) * 3))
        assert {block.mixing.keeps_all for block in decoder.blocks} == {expected}


@pytest.mark.parametrize("model_type", ["mamba", "mixtral"])
def test_gradients_are_the_same_on_every_rung(plan, model_type):
    sizes = {"mamba": {"time_step_rank": 2, "intermediate_size": 32}, "mixtral": {"num_local_experts": 4}}
    decoder = native.build(read({**CONFIG, "model_type": model_type, **sizes[model_type]}, "config.json"))
    ids, found = torch.arange(16)[None], []
    for rung in ("input", "mixer", "all") if model_type == "mamba" else ("input", "attention", "all"):
        set_up_layers(decoder, plan(layers="op by op", keep=(rung,) * 3))
        if rung == "all" and model_type == "mamba":
            for block in decoder.blocks:
                block.mixing.keeps_all = True
        found.append(torch.autograd.grad(decoder(ids).square().mean(), list(decoder.parameters()), allow_unused=True))
    for other in found[1:]:
        for mine, first in zip(other, found[0], strict=True):
            assert (mine is None) == (first is None)
            assert mine is None or torch.allclose(mine, first, rtol=1e-5, atol=1e-7)


def test_offloaded_layers_share_one_place_on_the_host(decoder, plan):
    expected = gradients(decoder)
    offload = set_up_layers(decoder, plan(layers="fused", keep=("attention",) * 3, offload_activations=True))
    assert {id(block.options.offload) for block in decoder.blocks} == {id(offload)}
    torch.testing.assert_close(gradients(decoder), expected, rtol=1e-4, atol=1e-5)
    assert offload.num_stored == 0


def test_the_last_layers_may_keep_theirs_on_the_device(decoder, plan):
    expected = gradients(decoder)
    settings = {"offload_activations": True, "staying_layers": 1, "host_bytes": 2 * 1000}
    offload = set_up_layers(decoder, plan(layers="fused", keep=("attention",) * 3, **settings))
    assert [block.options.offload for block in decoder.blocks] == [offload, offload, None]
    assert decoder.blocks[2].beside == (offload, 1000, True)  # what a layer has on the host, the last one has here
    torch.testing.assert_close(gradients(decoder), expected, rtol=1e-4, atol=1e-5)
    assert offload.num_stored == 0


@pytest.mark.parametrize("keep", ["mixer", "attention", "input"])
@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("size", [5, 7])  # of twelve tokens: two full tiles and a shorter one, or one and a shorter one
def test_tiles_give_the_same_loss_and_gradients(plan, keep, train_base, size):
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    runs = []
    for tile_tokens in (None, size):
        decoder = native.build(SPEC)
        if not train_base:
            add_lora(decoder, rank=2, alpha=4)
        for parameter in decoder.parameters():  # no gradient vanishes, as that of an adapter's a would with b = 0
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        set_up_layers(decoder, plan(layers="fused", keep=(keep,) * 3, tile_tokens=tile_tokens))
        assert {block.options.tile_tokens for block in decoder.blocks} == {tile_tokens}
        loss = decoder.logits(decoder(ids)).log_softmax(-1)[..., 1].sum()
        trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        runs.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    for whole, tiled in zip(*runs, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)  # fp32, sums over tiles in another order


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
def test_every_adapter_goes_through_the_layer_kernel(changes):
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
    assert why_not_fused(model) is None
    assert not execution.why_op_by_op(SPEC)


@pytest.fixture
def in_fp8():
    """A decoder in fp8 with an adapter; `without`: the numbers of layers that stay in full."""

    def make(without=()):
        model = native.build(SPEC)
        model.requires_grad_(requires_grad=False)
        for index in without:
            model.blocks[index].attention.qkv.weight.requires_grad_(requires_grad=True)  # passed over
        freeze_into(model, lambda weight, _: Fp8Weight.quantize(weight))
        add_lora(model, rank=2, alpha=4)
        return model

    return make


def test_fp8_weights_are_kept_transposed_as_planned_and_gradients_are_the_same(in_fp8, plan):
    decoder = in_fp8()
    weights = [module for module in decoder.modules() if isinstance(module, Fp8Weight)]
    expected = gradients(decoder)
    for kept in (True, False, None):  # what an earlier run in this process kept is let go
        set_up_weights(decoder, plan(quantization="fp8", keep_transposed=kept))
        assert {weight.transposed is not None for weight in weights} == {kept is True}
        assert all(map(torch.equal, gradients(decoder), expected))
    assert len(weights) == 12


def test_a_head_is_rounded_as_planned_unless_its_logits_would_move_too_far(in_fp8, plan):
    decoder, chosen = in_fp8(), plan(quantization="fp8", keep_transposed=True, head_in_fp8=True)
    set_up_weights(decoder, chosen)
    assert torch.equal(decoder.rounded_head.transposed.float(), decoder.rounded_head.values.float().T)
    assert not fp8_notice(decoder, chosen)
    ids = torch.randint(0, 40, (2, 6))
    batch = SimpleNamespace(input_ids=ids, targets=ids, document_lengths=None, num_trained_tokens=12, num_tokens=12)
    loss = SupervisedTask(decoder)(batch).loss_sum.item()
    set_up_weights(decoder, plan(quantization="fp8", keep_transposed=True, head_in_fp8=False))  # another run here
    assert decoder.rounded_head is None
    exact = SupervisedTask(decoder)(batch).loss_sum.item()
    assert loss == pytest.approx(exact, rel=0.01)
    assert loss != exact
    # Channels that the norm makes ten million times as large as those that the head reads.
    decoder.final_norm.weight.data[0] = 1e7
    decoder.head_weight.data[:, 0] = 0.0
    set_up_weights(decoder, chosen)
    assert decoder.rounded_head is None
    assert layers_not_in_fp8(decoder, chosen) == ["the head"]
    assert fp8_notice(decoder, chosen).startswith("1 of 13 linear layers stays in fp32, because fp8")


def test_a_head_that_grew_to_a_size_that_fp8_has_not_stays_as_it_is(in_fp8, plan):
    decoder, chosen = in_fp8(), plan(quantization="fp8", keep_transposed=True, head_in_fp8=True)
    grow(decoder, SPEC.vocab_size + 1)
    set_up_weights(decoder, chosen)
    assert decoder.rounded_head is None
    assert not fp8_notice(decoder, chosen)


def test_layers_that_stay_out_of_fp8_are_counted_and_named(in_fp8, plan):
    fp8 = plan(quantization="fp8", precision="bf16")
    assert not fp8_notice(in_fp8(), fp8)
    decoder = in_fp8(without=(0, 2))
    assert layers_not_in_fp8(decoder, fp8) == [
        f"model.layers.{index}.self_attn.q_proj, k_proj, v_proj" for index in (0, 2)
    ]
    sentence = fp8_notice(decoder, fp8)
    assert sentence.startswith("2 of 12 linear layers stay in bf16, because fp8 would move the output by more than 6%")
    assert sentence.endswith("model.layers.2.self_attn.q_proj, k_proj, v_proj.")
    assert not fp8_notice(decoder, plan(quantization="none"))


def test_a_warm_up_is_explained_where_kernels_are_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    assert "/somewhere" in warm_up_reason(SimpleNamespace(kernels="triton"))
    assert warm_up_reason(SimpleNamespace(kernels="reference")) == ""


def test_the_allocators_blocks_may_grow_unless_the_user_set_it(monkeypatch):
    import os

    from stoker.compose.execution import let_segments_grow

    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    let_segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    let_segments_grow()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
