"""Llama's family against Transformers on tiny random checkpoints: all checks of the oracle, and long positions."""

import json

import pytest
import torch
from oracle import CHECKS, TOLERANCE, assert_close, every_check, pair
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from stoker.arch import families
from stoker.models import native

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

ORIGINAL = 16
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 16.0,
        "truncate": False,
    },
}


def scaled(kind):
    # Dynamic scaling starts past max_position_embeddings, the others have their own original length.
    sizes = SIZES | {"max_position_embeddings": ORIGINAL if kind in {"linear", "dynamic"} else 4 * ORIGINAL}
    return LlamaConfig(**sizes, rope_parameters={"rope_theta": 10000.0, **SCALINGS[kind]})


CASES = {
    "llama2": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters={"rope_theta": 500000.0}),
    "llama3.1": LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_parameters={"rope_theta": 500000.0, **SCALINGS["llama3"]}
    ),
    "llama3.2": LlamaConfig(
        **SIZES,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 500000.0, **SCALINGS["llama3"]},
    ),
    "yi": LlamaConfig(**SIZES, num_key_value_heads=1, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 5e6}),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
    "mistral_no_window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "wide_heads": LlamaConfig(**SIZES, head_dim=12, num_key_value_heads=2),
}


@pytest.mark.parametrize(("name", "check"), every_check(CASES))
def test_a_family_computes_what_transformers_does(name, check):
    CHECKS[check](pair(CASES[name]))


def long(kind):
    """The pair of a scaling; Transformers' dynamic rope remembers the longest document, so it begins anew."""
    made = pair(scaled(kind))
    made.theirs.model.rotary_emb.__init__(made.theirs.config)
    return made


@torch.no_grad()
def test_packed_documents_of_a_rope_that_grows_equal_each_alone():
    lengths = ((5, 26, 9), (17, 1, 22))
    made = long("dynamic")
    ids = made.tokens(2, 40)
    packed = made.ours.logits(made.ours(ids, document_lengths=lengths))
    for row, sizes in enumerate(lengths):
        for document, found in zip(ids[row].split(sizes), packed[row].split(sizes), strict=True):
            assert_close(found, long("dynamic").theirs(document[None]).logits[0])


@pytest.mark.parametrize("kind", SCALINGS)
@torch.no_grad()
def test_positions_past_the_original_context_equal_transformers(kind):
    made = long(kind)
    ids = made.tokens(2, 3 * ORIGINAL)
    expected = made.theirs(ids).logits
    assert_close(made.ours.logits(made.ours(ids)), expected)
    plain = native.build(families.read(LlamaConfig(**SIZES).to_dict(), "config.json"))
    plain.load_state_dict(made.ours.state_dict())
    difference = (plain.logits(plain(ids)) - expected).abs().max()
    assert difference > 100 * TOLERANCE, "this length does not show the scaling"


@pytest.mark.parametrize("kind", SCALINGS)
@torch.no_grad()
def test_explicit_positions_equal_transformers(kind):
    made = long(kind)
    ids = made.tokens(1, 12)
    positions = torch.arange(12)[None] * 3 + 7
    expected = made.theirs(ids, position_ids=positions).logits
    assert_close(made.ours.logits(made.ours(ids, positions=positions)), expected)


@torch.no_grad()
def test_transformers_loads_what_we_save_in_several_files(tmp_path):
    made = pair(CASES["llama3.2"])
    native.save(made.ours, made.spec, tmp_path, config=CASES["llama3.2"].to_dict(), max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for key, parameter in made.theirs.named_parameters():
        assert torch.equal(loaded.get_parameter(key), parameter), key


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_old_form_of_rope_settings_reads_the_same(kind):
    config = scaled(kind).to_dict()
    new = families.read(config, "config.json")
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    old = families.read(json.loads(json.dumps(config | {"rope_scaling": rope})), "config.json")
    assert old == new
    assert old.layers[0].mixer.rope.scaling.kind == kind.partition("_")[0]


def test_absent_keys_take_transformers_defaults():
    for model_type, config_class in (("llama", LlamaConfig), ("mistral", MistralConfig)):
        assert families.read({"model_type": model_type}, "") == families.read(config_class().to_dict(), "")
