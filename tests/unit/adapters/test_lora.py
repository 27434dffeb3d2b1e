import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stoker.adapters.lora import LoraLinear, add_lora, lora_layers
from stoker.adapters.merge import merge_into
from stoker.errors import ModelError
from stoker.nn.frozen_linear import FrozenLinear
from stoker.quant.formats import quantize

VARIANTS = [{}, {"rank_stabilized": True}, {"dora": True}]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_new_adapter_changes_nothing_until_trained(make_model, x, train, options):
    model = make_model()
    before = model(x)
    add_lora(model, rank=2, alpha=4, **options)
    # DoRA multiplies by magnitude / norm, which is 1 up to the rounding of two norms.
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert (train(model)(x) - before).abs().max() > 0.1


def test_only_adapters_train_and_the_summary_counts_them(make_model):
    model = make_model()
    summary = add_lora(model, rank=2, alpha=4, targets=["q_proj", "v_proj", "o_proj"])
    trained = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"blocks.{block}.{name}": shape
        for block in range(2)
        for name, shape in {
            "qkv.lora_a": (4, 8),
            "qkv.lora_b": (12, 2),
            "out.lora_a": (2, 8),
            "out.lora_b": (8, 2),
        }.items()
    }
    assert summary.parameters == sum(math.prod(shape) for shape in trained.values())
    assert summary.names[:3] == tuple(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj", "o_proj"))
    assert len(summary.names) == 6


@pytest.mark.parametrize("options", VARIANTS)
def test_each_part_equals_its_own_formula(make_model, train, options):
    model = make_model()
    base = model.blocks[0].qkv
    add_lora(model, rank=2, alpha=3, targets=["q_proj", "v_proj"], **options)
    layer = train(model).blocks[0].qkv
    x = torch.randn(6, 8)
    output = layer(x)
    scaling = 3 / math.sqrt(2) if options.get("rank_stabilized") else 3 / 2
    for part in layer.adapters():
        merged = base.weight[part.rows] + scaling * part.b @ part.a
        if part.magnitude is not None:
            merged = merged * (part.magnitude / merged.norm(dim=1))[:, None]
        expected = x @ merged.T + base.bias[part.rows]
        torch.testing.assert_close(output[:, part.rows], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[:, base.slices[1]], base(x)[:, base.slices[1]], rtol=1e-6, atol=1e-6)


def test_initialisation_follows_the_seed_and_leaves_the_global_generator_alone(make_model):
    def initial(seed):
        model = make_model()
        add_lora(model, rank=2, alpha=4, seed=seed)
        return [layer.lora_a.detach() for layer in lora_layers(model)]

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = initial(1)
    assert torch.equal(torch.rand(3), expected)
    assert all(map(torch.equal, first, initial(1)))
    assert not torch.equal(first[0], initial(2)[0])
    assert not torch.equal(first[0], first[2])
    values = torch.cat([a.flatten() for a in first])
    assert values.abs().max() <= 1 / math.sqrt(8)
    # A uniform distribution on [-c, c] has standard deviation c / sqrt(3); 128 draws give it to about 6%.
    assert values.std().item() == pytest.approx(1 / math.sqrt(24), rel=0.2)


def test_adapters_stay_fp32_on_a_bf16_base_and_compute_in_its_dtype(make_model, x):
    model = make_model(torch.bfloat16)
    add_lora(model, rank=2, alpha=4, dora=True)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    output = model(x.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"dropout": 0.3, "dora": True}])
def test_checkpointing_a_block_gives_the_same_gradients(make_model, x, train, options):
    model = make_model()
    add_lora(model, rank=2, alpha=4, **options)
    train(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(3)
    plain = torch.autograd.grad(model(x).square().sum(), trained)
    torch.manual_seed(3)
    hidden = x
    for block in model.blocks:
        hidden = checkpoint(block, hidden, use_reentrant=False)
    recomputed = torch.autograd.grad(hidden.square().sum(), trained)
    assert all(map(torch.equal, plain, recomputed))


def test_dropout_acts_in_training_only(make_model, x, train):
    model = make_model()
    add_lora(model, rank=2, alpha=4, dropout=0.5)
    train(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_adapters_take_the_mode_of_the_layer_they_replace(make_model):
    model = make_model().eval()
    add_lora(model, rank=2, alpha=4)
    assert not any(layer.training for layer in lora_layers(model))


def test_dora_norms_follow_every_change_while_decoding(make_model, x, train):
    model = make_model().eval()
    add_lora(model, rank=2, alpha=4, dora=True)
    with torch.no_grad():
        model(x)
    train(model)
    with torch.no_grad():
        kept = model(x)
        assert torch.equal(model(x), kept)
    torch.testing.assert_close(kept, model(x).detach(), rtol=0, atol=0)


def test_dora_norms_are_computed_once_while_decoding(make_model, x, monkeypatch):
    calls = []
    model = make_model().eval()
    add_lora(model, rank=2, alpha=4, targets=["o_proj"], dora=True)
    original = LoraLinear._row_norms.__globals__["row_norms"]
    monkeypatch.setattr("stoker.adapters.lora.row_norms", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    with torch.no_grad():
        model(x), model(x)
    assert len(calls) == 2  # one for each of the two blocks
    model.train()(x), model(x)
    assert len(calls) == 6


def test_unknown_targets_leave_the_model_as_it_was(make_model):
    model = make_model()
    with pytest.raises(ModelError, match="There are 'q_proj', 'k_proj', 'v_proj', 'o_proj'"):
        add_lora(model, rank=2, alpha=4, targets=["w1"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not list(lora_layers(model))


def test_a_second_set_of_adapters_is_refused(make_model):
    model = make_model()
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, rank=2, alpha=4, targets=["v_proj"])


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_settings_without_meaning_are_refused(make_model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        add_lora(make_model(), **{"rank": 2, "alpha": 4, **options})


@pytest.fixture
def make_pair(make_model, train):
    """A model over a quantised base, and the same over that base's values in full, with equal adapters."""

    def make(**options):
        models = []
        for is_dense in (False, True):
            model = make_model()
            add_lora(model, rank=2, alpha=4, **options)
            for layer in lora_layers(model):
                frozen = FrozenLinear(layer.base, quantize(layer.base.weight, "nf4", part_rows=layer.base.out_features))
                if is_dense:
                    layer.base.weight.data = frozen.weight
                else:
                    layer.base = frozen
                if layer.magnitude is not None:
                    layer.magnitude.data = layer._row_norms()
            models.append(train(model))
        return models

    return make


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"targets": ["k_proj"]}, {"targets": ["q_proj", "v_proj"]}])
def test_adapter_over_a_quantized_base_is_that_over_its_values(make_pair, x, options):
    results = []
    for model in make_pair(**options):
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        grads = torch.autograd.grad(output.square().sum(), [inputs, *trained.values()])
        results.append((output.detach(), *grads))
    # fp32; the update is added after the base's product instead of into it.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_dropout_over_a_quantized_base_acts_on_the_update_in_training_only(make_pair, x):
    model, dense = make_pair(dropout=0.5)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), dense.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dropout": 0.1}])
def test_a_quantized_base_is_never_saved_in_full(make_pair, x, options):
    model, _ = make_pair(**options)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        model(x)
    assert saved
    assert torch.Size((16, 8)) not in saved  # of q, k and v together; adapters have other shapes


def test_a_quantized_base_computes_in_autocasts_dtype(make_pair, x):
    model, _ = make_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = next(lora_layers(model))(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert next(lora_layers(model)).lora_a.grad.dtype == torch.float32


def test_a_quantized_base_cannot_be_merged_into(make_pair):
    model, _ = make_pair()
    with pytest.raises(ValueError, match="cannot hold a merged weight"):
        merge_into(model)
