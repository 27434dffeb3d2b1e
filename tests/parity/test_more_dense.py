"""More dense families against Transformers: one line a variant, all checks of the oracle."""

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import CHECKS, assert_close, pair
from safetensors.torch import load_file, save_file
from transformers import (
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from stoker.adapters.lora import add_lora
from stoker.adapters.merge import merge_into
from stoker.arch import families
from stoker.export import adapter
from stoker.models import native
from stoker.models.folder import read_config

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
MIXED = {**SIZES, "num_hidden_layers": 4, "sliding_window": 8}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
CASES = {
    "stablelm": StableLmConfig(**SIZES, **HALF),
    "stablelm 2 12b": StableLmConfig(**SIZES, **HALF, qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True),
    "olmo": OlmoConfig(**SIZES, clip_qkv=0.5),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(**MIXED),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "smollm3 windows": SmolLM3Config(**MIXED, use_sliding_window=True, no_rope_layer_interval=2, attention_bias=True),
    "granite": GraniteConfig(
        **SIZES, embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.4, attention_multiplier=0.3
    ),
    "cohere": CohereConfig(**SIZES, logit_scale=0.5),
    "cohere plus": CohereConfig(**SIZES, logit_scale=0.5, use_qk_norm=True, attention_bias=True),
    "cohere2": Cohere2Config(**MIXED, logit_scale=0.5),
    "starcoder2": Starcoder2Config(**SIZES, sliding_window=8),
    "exaone4": Exaone4Config(**MIXED, sliding_window_pattern=2),
    "exaone4 whole": Exaone4Config(**SIZES, sliding_window=None, layer_types=["full_attention"] * 2),
    "glm": GlmConfig(**SIZES, **HALF, head_dim=12),
    "glm4": Glm4Config(**SIZES, **HALF, head_dim=8),
    "arcee": ArceeConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "arcee biases": ArceeConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_what_transformers_does(name, check):
    CHECKS[check](pair(CASES[name]))


@pytest.mark.parametrize("kind", sorted({type(config) for config in CASES.values()}, key=lambda kind: kind.__name__))
def test_absent_keys_take_transformers_defaults(kind):
    written = kind().to_dict()
    assert families.read({"model_type": written["model_type"]}, "") == families.read(written, "config.json")


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


def internlm2(*, bias=False):
    like = pair(LlamaConfig(**SIZES, attention_bias=bias))
    return rewritten(like, as_internlm2(stored(like)), model_type="internlm2", bias=bias)


def internlm3():
    like = pair(LlamaConfig(**SIZES))
    return rewritten(like, stored(like), model_type="internlm3", bias=False, qkv_bias=False)


def minicpm():
    config = copy.deepcopy(CASES["granite"])
    config.embedding_multiplier, config.residual_multiplier = 12.0, 1.4 / 2**0.5
    config.logits_scaling, config.attention_multiplier = 32 / 8, 8**-0.5
    like = pair(config)
    return rewritten(
        like,
        stored(like),
        model_type="minicpm",
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=8,
        tie_word_embeddings=False,
    )


STAND_INS = {
    "internlm2": internlm2,
    "internlm2 biases": lambda: internlm2(bias=True),
    "internlm3": internlm3,
    "minicpm": minicpm,
}
"""Model types whose code is not in Transformers: beside a class that computes the same with its weights stored
otherwise."""


@pytest.mark.parametrize("check", ["logits", "loss", "padding", "packing", "generation", "counts", "layers", "nf4"])
@pytest.mark.parametrize("name", STAND_INS)
def test_a_family_that_transformers_has_not_computes_what_its_stand_in_does(name, check):
    CHECKS[check](STAND_INS[name]())


@pytest.mark.parametrize("name", STAND_INS)
def test_what_is_saved_is_what_was_stored(name):
    made = STAND_INS[name]()
    saved, expected = dict(native.hf_tensors(made.ours, made.spec)), stored(made)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize("check", ["gradients", "lora", "bf16"])
@pytest.mark.parametrize("name", ["internlm3", "minicpm"])
def test_stand_ins_whose_weights_have_the_same_names_have_the_same_gradients_and_adapters(name, check):
    CHECKS[check](STAND_INS[name]())


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


def test_internlm2_in_bf16():
    CHECKS["bf16"](internlm2())


def test_an_adapter_of_internlm2_is_read_back_and_merges_into_what_its_stand_in_computes(tmp_path):
    made = internlm2()
    model = made.fresh()
    add_lora(model, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    adapter.save(model, tmp_path, base_name=str(made.folder))
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert {f"model.layers.0.attention.{part}.lora_A.weight" for part in ("wqkv", "wo")} <= names
    assert {f"model.layers.1.feed_forward.w{part}.lora_B.weight" for part in (1, 2, 3)} <= names
    ids, again = made.tokens(2, 16), made.fresh()
    adapter.load(again, tmp_path)
    theirs = copy.deepcopy(made.theirs)
    with torch.no_grad():
        found = model.logits(model(ids))
        assert_close(again.logits(again(ids)), found)
        merge_into(model)
        theirs.load_state_dict(as_llama(dict(native.hf_tensors(model, made.spec))))
        assert_close(found, theirs(ids, use_cache=False).logits)
        assert (found - made.theirs(ids, use_cache=False).logits).abs().max() > 1e-3
