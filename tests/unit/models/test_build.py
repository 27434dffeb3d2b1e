"""Every feature that a spec can say of a dense layer, alone: it counts, packs, decodes, and changes what comes out."""

from dataclasses import replace

import pytest
import torch

from stoker.adapters.fused_block import fuse_blocks, why_not_fused
from stoker.arch import arithmetic, families, saved
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.saved import Micro
from stoker.arch.shape import why_not_llama
from stoker.arch.spec import GatedSpec, LayerSpec, NormSpec, PlainSpec
from stoker.models import build, native

BASE = families.read(
    {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    },
    "config.json",
)
LAYER = BASE.layers[0]
MIXER, NORM = LAYER.mixer, LAYER.norm
LAYER_NORM = NormSpec("layer", bias=True)
NAMES = Names(
    {
        **SEPARATE,
        "attention.sinks": "self_attn.sinks",
        "attention_post_norm": "attention_after",
        "feed_forward_post_norm": "feed_forward_after",
        "feed_forward.up": "mlp.up",
    }
)


def attention(**changes):
    return replace(LAYER, mixer=replace(MIXER, **changes))


LAYERS = {
    "layer norm": replace(LAYER, norm=LAYER_NORM),
    "layer norm without weight": replace(LAYER, norm=NormSpec("layer", weight=False)),
    "layer norm with offset": replace(LAYER, norm=replace(LAYER_NORM, weight_offset=1.0)),
    "norm without weight": replace(LAYER, norm=NormSpec(weight=False)),
    "norm with offset": replace(LAYER, norm=NormSpec(weight_offset=1.0)),
    "no positions": attention(rope=None),
    "partly turned": attention(rope=replace(MIXER.rope, dim=4)),
    "interleaved": attention(rope=replace(MIXER.rope, interleaved=True)),
    "partly turned, interleaved": attention(rope=replace(MIXER.rope, dim=4, interleaved=True)),
    "window": attention(window=3),
    "scale": attention(scale=0.1),
    "soft-cap": attention(softcap=0.5),
    "sinks": attention(sinks=True, window=4),
    "norm of each head": attention(qk_norm=NORM),
    "norm of heads, each its weight": attention(qk_norm=NORM, qk_norm_over="each_head"),
    "layer norm of heads, each its weight": attention(qk_norm=NormSpec("layer"), qk_norm_over="each_head"),
    "norm of all heads": attention(qk_norm=NORM, qk_norm_over="all"),
    "clip": attention(clip_qkv=0.05),
    "grouped": attention(qkv_layout="grouped"),
    "biases": replace(attention(qkv_bias=True, out_bias=True), feed_forward=GatedSpec(24, bias=True)),
    "gelu": replace(LAYER, feed_forward=GatedSpec(24, "gelu")),
    "gelu_tanh": replace(LAYER, feed_forward=GatedSpec(24, "gelu_tanh")),
    "relu": replace(LAYER, feed_forward=GatedSpec(24, "relu")),
    "scaled gate": replace(LAYER, feed_forward=GatedSpec(24, gate_scale=2.0, down_scale=0.5)),
    "plain": replace(LAYER, feed_forward=PlainSpec(24, "relu_squared")),
    "post": replace(LAYER, placement="post"),
    "sandwich": replace(LAYER, placement="sandwich"),
    "parallel": replace(LAYER, placement="parallel"),
    "parallel, one norm": replace(LAYER, placement="parallel_one_norm"),
    "residual scale": replace(LAYER, residual_scale=0.3),
    "no feed-forward": replace(LAYER, feed_forward=None),
    "no mixer": replace(LAYER, mixer=None),
}
WHOLE = {
    "embedding scale": {"embedding_scale": 3.0},
    "learned positions": {"learned_positions": 64, "position_offset": 2},
    "logit scale": {"logit_scale": 0.2},
    "logit soft-cap": {"logit_softcap": 0.05},
    "head bias": {"head_bias": True},
    "final layer norm": {"final_norm": LAYER_NORM},
}
SPECS = {name: replace(BASE, layers=(layer, LAYER)) for name, layer in LAYERS.items()}
SPECS |= {name: replace(BASE, **changes) for name, changes in WHOLE.items()}


@pytest.fixture(autouse=True)
def _names(monkeypatch):
    for module in (build, native, arithmetic):
        monkeypatch.setattr(module, "weight_map", lambda spec: entries(spec, NAMES))


@pytest.fixture
def ids():
    return torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))


def make(spec):
    decoder = native.build(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return decoder


@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_counted_as_they_are_built(name):
    named = dict(native.build(SPECS[name]).named_parameters())
    assert arithmetic.num_parameters(SPECS[name]) == sum(parameter.numel() for parameter in named.values())
    assert {entry.ours for entry in entries(SPECS[name], NAMES)} == named.keys()


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_each_feature_changes_what_comes_out(name, ids):
    plain = make(BASE)
    if name.startswith("no "):
        assert make(SPECS[name])(ids).isfinite().all()
        return
    other = native.build(SPECS[name])
    known = plain.state_dict()
    # The weights of the plain model, where it has them: what differs is what the feature computes.
    other.load_state_dict({**make(SPECS[name]).state_dict(), **_fitting(known, other)})
    assert (other.logits(other(ids)) - plain.logits(plain(ids))).abs().max() > 1e-4


def _fitting(known, model):
    wanted = model.state_dict()
    return {name: tensor for name, tensor in known.items() if name in wanted and tensor.shape == wanted[name].shape}


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_packed_documents_and_pieces_through_a_cache_equal_the_whole(name, ids):
    decoder = make(SPECS[name])
    whole = decoder(ids)
    packed = decoder(ids, document_lengths=((5, 7), (1, 11)))
    for row, lengths in enumerate([(5, 7), (1, 11)]):
        for piece, found in zip(ids[row].split(lengths), packed[row].split(lengths), strict=True):
            assert (decoder(piece[None])[0] - found).abs().max() <= 5e-6
    cache = decoder.new_cache(capacity=12, batch_size=2)
    pieces = [decoder(piece, cache=cache) for piece in ids.split([4, 1, 5, 2], dim=1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 5e-6


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_the_layer_kernel_cannot_run_goes_beside_one_that_it_can(name, ids):
    plain, mixed = make(SPECS[name]), make(SPECS[name])
    assert why_not_fused(mixed) is None
    assert not why_not_llama(LAYER)
    fuse_blocks(mixed, keep="mixer", implementation="reference")
    assert mixed.blocks[0].recompute == bool(why_not_llama(SPECS[name].layers[0]))
    results = []
    for decoder in (plain, mixed):
        hidden = decoder(ids)
        results.append([hidden, *torch.autograd.grad(hidden.square().mean(), [*decoder.blocks.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32, sums in another order


@pytest.mark.parametrize(
    "name", ["layer norm", "soft-cap", "norm of each head", "gelu", "plain", "sandwich", "parallel"]
)
def test_saved_bytes_are_what_autograd_keeps(name):
    spec = replace(BASE, layers=(LAYERS[name],) * 3)
    model, ids = make(spec), torch.randint(0, 40, (2, 12))
    kept = {}

    def pack(tensor):
        if not any(tensor.data_ptr() == parameter.data_ptr() for parameter in model.parameters()):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    # Besides the blocks: ids, rope tables of 256 positions, the final norm's input and statistic.
    besides = 24 * 8 + 2 * 256 * 4 * 4 + 24 * 16 * 4 + 24 * 4
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - besides
    predicted = saved.by_model(spec, Micro(24, 4, is_plain=True))
    assert measured == pytest.approx(predicted, rel=0.1)


def test_a_type_without_a_builder_says_so():
    class Unknown:
        pass

    with pytest.raises(TypeError, match="no builder of a Unknown"):
        build.mixer(Unknown(), None)
    with pytest.raises(TypeError, match="does not say what a Unknown consists of"):
        arithmetic.linears(LayerSpec(Unknown(), None, NORM), 16)
