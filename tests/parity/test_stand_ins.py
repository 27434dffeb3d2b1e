"""Families that Transformers lacks: beside a class of it that computes the same with its weights stored otherwise."""

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import CHECKS, assert_close, every_check, pair, proved
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, LlamaConfig

from stoker.adapters.lora import add_lora
from stoker.arch import families
from stoker.export import adapter
from stoker.export.merged import merge
from stoker.models import native
from stoker.models.folder import read_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def rewritten(like, tensors, **changes):
    """The pair `like` with our model from a copy of its folder that has other tensors and other settings."""
    folder = Path(tempfile.mkdtemp(prefix="parity-stand-in-"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(read_config(like.folder) | changes))
    spec = families.read(read_config(folder), str(folder))
    return replace(like, ours=native.load(folder, spec).eval(), spec=spec, folder=folder)


def stored(like):
    return load_file(like.folder / "model.safetensors")


INTERNLM2 = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
}
KV_HEADS, HEAD_DIM = 2, 8


def as_internlm2(tensors):
    """Llama's tensors under InternLM 2's names: q, k and v as one, row by row of each key/value head."""
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer.endswith(("k_proj", "v_proj")):
            continue
        ours = name
        for theirs, other in INTERNLM2.items():
            ours = ours.replace(theirs, other)
        if layer.endswith("q_proj"):
            parts = [tensors[f"{layer[: -len('q_proj')]}{part}_proj.{kind}"] for part in "qkv"]
            heads = [part.view(KV_HEADS, -1, HEAD_DIM, *part.shape[1:]) for part in parts]
            ours = f"{layer.replace('self_attn.q_proj', 'attention.wqkv')}.{kind}"
            renamed[ours] = torch.cat(heads, 1).flatten(0, 2)
        else:
            renamed[ours] = tensor
    return renamed


def as_llama(tensors):
    """The inverse of `as_internlm2`."""
    renamed = {}
    for name, tensor in tensors.items():
        theirs = name
        for llama, other in INTERNLM2.items():
            theirs = theirs.replace(other, llama)
        if "attention.wqkv" not in theirs:
            renamed[theirs] = tensor
            continue
        groups = tensor.view(KV_HEADS, -1, HEAD_DIM, *tensor.shape[1:])
        for part, heads in zip("qkv", groups.split((groups.shape[1] - 2, 1, 1), 1), strict=True):
            renamed[theirs.replace("attention.wqkv", f"self_attn.{part}_proj")] = heads.flatten(0, 2)
    return renamed


def internlm2(*, bias=False, tied=False):
    like = pair(LlamaConfig(**SIZES, attention_bias=bias, tie_word_embeddings=tied))
    return rewritten(like, as_internlm2(stored(like)), model_type="internlm2", bias=bias)


def minicpm(*, tied=True):
    config = GraniteConfig(
        **SIZES,
        embedding_multiplier=12.0,
        residual_multiplier=1.4 / 2**0.5,
        logits_scaling=32 / 8,
        attention_multiplier=8**-0.5,
        tie_word_embeddings=tied,
    )
    like = pair(config)
    return rewritten(like, stored(like), model_type="minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=8)


STAND_INS = {"internlm2": internlm2, "internlm2 biases": lambda: internlm2(bias=True), "minicpm": minicpm}
SAME_NAMES = {"minicpm": minicpm}


@pytest.mark.parametrize(
    ("name", "check"),
    [
        *every_check(
            STAND_INS, ["logits", "loss", "padding", "packing", "generation", "counts", "layers", "nf4", "bf16"]
        ),
        *every_check(SAME_NAMES, ["gradients", "lora", "targets"]),
    ],
)
def test_a_family_that_transformers_has_not_computes_what_its_stand_in_does(name, check):
    CHECKS[check](STAND_INS[name]())


@pytest.mark.parametrize("name", proved(STAND_INS, "round trip"))
def test_what_is_saved_is_what_was_stored(name):
    made = STAND_INS[name]()
    saved, expected = dict(native.hf_tensors(made.ours, made.spec)), stored(made)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", proved(["internlm2", "minicpm"], "tied"))
def test_heads_are_the_embeddings_where_the_configuration_says_so(name, tied):
    made = STAND_INS[name](tied=tied)
    assert made.spec.tied_head == tied
    CHECKS["logits"](made)
    CHECKS["counts"](made)
    assert dict(native.hf_tensors(made.ours, made.spec)).keys() == stored(made).keys()


def adapted(made, folder):
    """Our model with an adapter on all layers that does something, which is written to `folder` too."""
    model = made.fresh()
    add_lora(model, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    adapter.save(model, folder, base_name=str(made.folder))
    return model


@pytest.mark.proves("gradients", model_type="internlm2")
@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_has_its_stand_ins_gradients(bias):
    made = internlm2(bias=bias)
    ids, theirs = made.tokens(2, 24), made.theirs
    theirs.zero_grad()
    for logits in (theirs(ids, use_cache=False).logits, made.ours.logits(made.ours(ids))):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    expected = as_internlm2({name: parameter.grad for name, parameter in theirs.named_parameters()})
    with torch.no_grad():
        for parameter in made.ours.parameters():
            parameter.copy_(parameter.grad)
    found = dict(native.hf_tensors(made.ours, made.spec))
    theirs.zero_grad()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= made.tolerance * max(1.0, gradient.abs().max()), name


@pytest.mark.proves("lora", "targets", "export", model_type="internlm2")
def test_an_adapter_of_internlm2_is_read_back_and_merges_into_what_its_stand_in_computes(tmp_path):
    made = internlm2()
    model = adapted(made, tmp_path)
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    layers = [*(f"attention.{part}" for part in ("wqkv", "wo")), *(f"feed_forward.w{part}" for part in (1, 2, 3))]
    assert names == {
        f"model.layers.{index}.{name}.lora_{part}.weight" for index in (0, 1) for name in layers for part in "AB"
    }
    ids, again = made.tokens(2, 16), made.fresh()
    adapter.load(again, tmp_path)
    theirs = copy.deepcopy(made.theirs)
    merge(made.folder, tmp_path, tmp_path / "merged")
    with torch.no_grad():
        found = model.logits(model(ids))
        assert_close(again.logits(again(ids)), found)
        theirs.load_state_dict(as_llama(load_file(tmp_path / "merged" / "model.safetensors")))
        assert_close(found, theirs(ids, use_cache=False).logits)
        assert (found - made.theirs(ids, use_cache=False).logits).abs().max() > 1e-3


@pytest.mark.proves("export", model_type="minicpm")
def test_a_merged_minicpm_is_what_base_and_adapter_compute(tmp_path):
    made = minicpm()
    model = adapted(made, tmp_path)
    merge(made.folder, tmp_path, tmp_path / "merged")
    theirs = type(made.theirs).from_pretrained(tmp_path / "merged", config=made.theirs.config)
    ids = made.tokens(2, 16)
    with torch.no_grad():
        assert_close(model.logits(model(ids)), theirs(ids, use_cache=False).logits)
