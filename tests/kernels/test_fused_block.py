"""A model whose layers run through the layer kernel trains as it does op by op."""

from dataclasses import replace

import pytest
import torch

from stoker.adapters.fused_block import freeze_into, fuse_blocks, why_not_fused
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.kernels.block import KEEP
from stoker.kernels.offload import HostOffload
from stoker.models import native
from stoker.nn.frozen_linear import FrozenLinear
from stoker.quant.formats import quantize

CONFIG = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def make(device, *, adapter=True, kind=None, **lora):
    model = native.build(read(CONFIG, "config.json"), device=device, seed=1)
    if adapter:
        add_lora(model, rank=2, alpha=4, **lora)
        for name, parameter in model.named_parameters():
            if "lora_b" in name:  # zero at the start, which would hide the gradient of A
                generator = torch.Generator().manual_seed(len(name))
                parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1).to(device)
    if kind is not None:
        freeze_into(model, lambda weight, rows: quantize(weight, kind, part_rows=rows))
    return model


def step(model, device):
    ids = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0)).to(device)
    hidden = model(ids)
    weight = torch.linspace(-1, 1, hidden.numel(), device=device).view_as(hidden)
    (hidden * weight).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"adapter": False},
        {"kind": "nf4"},
        {"targets": ["q_proj", "up_proj"]},
        {"kind": "int8"},
        {"dora": True},
        {"dora": True, "kind": "nf4", "targets": ["q_proj", "down_proj"]},
    ],
)
def test_fused_model_has_the_same_output_and_gradients(how, keep, device):
    expected, expected_grads = step(make(device, **how), device)
    model = make(device, **how)
    fuse_blocks(model, keep=keep, implementation="reference")
    actual, grads = step(model, device)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # float32, sums in another order
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("adapter", [True, False])
def test_what_differs_from_llama_in_a_field_alone_is_fused_too(adapter, implementation, device):
    """A GeGLU with tanh, norms stored less one, half of each head turned, neighbours together, another scale."""
    spec = read(CONFIG, "config.json")
    layer = spec.layers[0]
    rope = replace(layer.mixer.rope, dim=2, interleaved=True)
    layer = replace(
        layer,
        mixer=replace(layer.mixer, rope=rope, scale=0.3),
        feed_forward=replace(layer.feed_forward, activation="gelu_tanh"),
        norm=replace(layer.norm, weight_offset=1.0),
    )
    results = []
    for fused in (False, True):
        model = native.build(replace(spec, layers=(layer,) * 2), device=device, seed=1)
        if adapter:
            add_lora(model, rank=2, alpha=4)
        if fused:
            assert why_not_fused(model) is None
            fuse_blocks(model, keep="attention", implementation=implementation)
        results.append(step(model, device))
    (expected, expected_grads), (actual, grads) = results
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("keep", KEEP)
def test_activations_that_wait_on_the_host_change_nothing(keep, device):
    offload = HostOffload(min_bytes=1)
    expected, expected_grads = step(make(device), device)
    model = make(device)
    fuse_blocks(model, keep=keep, offload=offload, implementation="reference")
    for _ in range(2):  # the second step uses the host buffers of the first
        model.zero_grad()
        actual, grads = step(model, device)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-4)
    assert offload.num_stored == 0
    assert offload.host_bytes >= 2 * 2 * 6 * 16 * 4  # at least the two layers' inputs


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("keep", KEEP)
def test_layers_that_stay_on_the_device_beside_others_on_the_host_change_no_bit(keep, adapter, device):
    expected_model = make(device, adapter=adapter)
    fuse_blocks(expected_model, keep=keep, implementation="reference")
    expected, expected_grads = step(expected_model, device)
    for staying in (1, 2):
        offload = HostOffload(min_bytes=1, spare_bytes=512)
        model = make(device, adapter=adapter)
        fuse_blocks(model, keep=keep, offload=offload, implementation="reference", staying=staying)
        assert [layer.options.offload is None for layer in model.blocks] == [index >= 2 - staying for index in (0, 1)]
        for _ in range(2):
            model.zero_grad()
            actual, grads = step(model, device)
            assert torch.equal(actual, expected)
            assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads.items())
        assert offload.num_stored == 0
        assert (offload.host_bytes > 0) == (staying == 1)


def test_the_last_layers_let_the_others_tensors_leave_and_have_them_brought_back_in_time(device, monkeypatch):
    model, calls = make(device), []
    offload = HostOffload(min_bytes=1, spare_bytes=300)
    fuse_blocks(model, keep="mixer", offload=offload, implementation="reference", staying=1)
    for name in ("store", "stay", "bring", "fetch"):
        method = getattr(offload, name)

        def noted(*given, name=name, method=method):
            calls.append((name, *given) if name == "stay" else name)
            return method(*given)

        monkeypatch.setattr(offload, name, noted)
    ids = torch.tensor([[1, 2, 3]], device=device)
    output = model(ids)
    assert calls.index(("stay", 300)) == len(calls) - 1 == calls.count("store")
    num_forward = len(calls)
    output.sum().backward()
    assert calls[num_forward] == "bring"
    assert set(calls[num_forward + 1 :]) == {"fetch"}
    num_both = len(calls)
    with torch.no_grad():  # what runs without a backward keeps nothing
        model(ids)
    assert len(calls) == num_both


def test_without_gradients_nothing_is_stored(device):
    offload = HostOffload(min_bytes=1)
    model = make(device)
    expected = model(torch.tensor([[1, 2, 3]], device=device))
    fuse_blocks(model, offload=offload, implementation="reference")
    with torch.no_grad():
        actual = model(torch.tensor([[1, 2, 3]], device=device))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert offload.host_bytes == 0


def test_each_layer_may_have_its_own_rung(device):
    expected, _ = step(make(device), device)
    model = make(device)
    fuse_blocks(model, keep=["input", "all"])
    assert [layer.options.keep for layer in model.blocks] == ["input", "all"]
    torch.testing.assert_close(step(model, device)[0], expected, rtol=1e-4, atol=1e-5)


def test_decoding_with_a_cache_goes_on_as_before(device):
    ids = torch.tensor([[3, 5, 7, 9]], device=device)
    model = make(device)
    expected = model(ids)
    fuse_blocks(model, implementation="reference")
    cache = model.new_cache(capacity=4)
    with torch.no_grad():
        pieces = [model(ids[:, :3], cache=cache), model(ids[:, 3:], cache=cache)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_quantised_layers_hold_no_plain_weight(device):
    model = make(device, kind="nf4")
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(layers) == 8
    assert not any("base.weight" in name for name, _ in model.named_parameters())
    assert all(layer.weight.shape == (sum(layer.out_features), layer.in_features) for layer in layers)


@pytest.mark.parametrize("keep", KEEP)
def test_dropout_drops_what_op_by_op_drops(keep, device):
    ids = torch.tensor([[3, 5, 7, 9]], device=device)
    results = []
    for fused in (False, True):
        model = make(device, dropout=0.3)
        if fused:
            fuse_blocks(model, keep=keep, implementation="reference")
        torch.manual_seed(5)
        trained = model(ids)
        adapters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(trained.square().sum(), adapters)
        with torch.no_grad():
            results.append([trained.detach(), *grads, model.eval()(ids)])
    assert not torch.equal(results[0][0], results[0][-1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())


def test_wrong_number_of_rungs_is_refused(device):
    with pytest.raises(ValueError, match="1 rungs for 2 layers"):
        fuse_blocks(make(device), keep=["all"])
