"""Llama's family against Transformers on tiny random checkpoints: logits, gradients, packing, long positions."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stoker.arch import families
from stoker.models import native
from stoker.models.folder import read_config

# Both sides are fp32 and sum in different orders; logits are of order 1, where fp32 resolves 1e-7.
TOLERANCE = 1e-5

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


CONFIGS = {
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A function: a Transformers configuration to (its model, our decoder), from one saved checkpoint."""
    made = {}

    def make(config):
        key = config.to_json_string()
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            kind = MistralForCausalLM if config.model_type == "mistral" else LlamaForCausalLM
            torch.manual_seed(0)
            theirs = kind(config).eval()
            with torch.no_grad():
                # Norms of one and biases of zero would hide a mistake in either.
                for parameter in theirs.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            theirs.save_pretrained(folder)
            spec = families.read(read_config(folder), str(folder))
            made[key] = theirs, native.load(folder, spec), spec
        theirs, ours, spec = made[key]
        theirs.zero_grad()
        ours.zero_grad()
        return theirs, ours, spec

    return make


def tokens(*shape, seed=1):
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours, theirs):
    assert theirs.abs().max() > 0.1, "logits this small would hide a difference"
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(pair, name):
    theirs, ours, _ = pair(CONFIGS[name])
    ids = tokens(3, 40)
    assert_close(ours.logits(ours(ids)), theirs(ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_transformers(pair, name):
    theirs, ours, spec = pair(CONFIGS[name])
    ids = tokens(2, 24)
    for model, logits in ((theirs, theirs(ids).logits), (ours, ours.logits(ours(ids)))):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="mean").backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for parameter in ours.parameters():
        parameter.data = parameter.grad  # so that the split by Hugging Face names is that of the gradients
    found = dict(native.hf_tensors(ours, spec))
    try:
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (found[key] - gradient).abs().max() <= TOLERANCE * max(1.0, gradient.abs().max().item()), key
    finally:
        with torch.no_grad():
            for key, tensor in native.hf_tensors(ours, spec):
                tensor.copy_(theirs.get_parameter(key))


@pytest.mark.parametrize("name", ["llama3", "mistral"])
@torch.no_grad()
def test_right_padding_changes_no_token_before_it(pair, name):
    theirs, ours, _ = pair(CONFIGS[name])
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    expected = theirs(ids, attention_mask=mask).logits
    found = ours.logits(ours(ids))
    assert_close(found[0, :10], expected[0, :10])
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("config", [*(CONFIGS[name] for name in ("llama3.1", "mistral")), scaled("dynamic")])
@torch.no_grad()
def test_packed_documents_equal_each_alone(pair, config):
    theirs, ours, _ = pair(config)
    lengths = ((5, 26, 9), (17, 1, 22))
    ids = tokens(2, 40)
    packed = ours.logits(ours(ids, document_lengths=lengths))
    for row, sizes in enumerate(lengths):
        for document, found in zip(ids[row].split(sizes), packed[row].split(sizes), strict=True):
            # Transformers' dynamic rope remembers the longest document, so each gets a fresh length.
            theirs.model.rotary_emb.__init__(theirs.config)
            assert_close(found, theirs(document[None]).logits[0])


@pytest.mark.parametrize("kind", SCALINGS)
@torch.no_grad()
def test_positions_past_the_original_context_equal_transformers(pair, kind):
    theirs, ours, _ = pair(scaled(kind))
    theirs.model.rotary_emb.__init__(theirs.config)
    ids = tokens(2, 3 * ORIGINAL)
    assert_close(ours.logits(ours(ids)), theirs(ids).logits)
    plain = native.build(families.read(LlamaConfig(**SIZES).to_dict(), "config.json"))
    plain.load_state_dict(ours.state_dict())
    difference = (plain.logits(plain(ids)) - theirs(ids).logits).abs().max()
    assert difference > 100 * TOLERANCE, "this length does not show the scaling"


@pytest.mark.parametrize("kind", SCALINGS)
@torch.no_grad()
def test_explicit_positions_equal_transformers(pair, kind):
    theirs, ours, _ = pair(scaled(kind))
    theirs.model.rotary_emb.__init__(theirs.config)
    ids = tokens(1, 12)
    positions = torch.arange(12)[None] * 3 + 7
    expected = theirs(ids, position_ids=positions).logits
    assert_close(ours.logits(ours(ids, positions=positions)), expected)


@pytest.mark.parametrize("name", ["llama3.1", "mistral"])
@torch.no_grad()
def test_decoding_with_a_cache_equals_transformers(pair, name):
    theirs, ours, _ = pair(CONFIGS[name])
    ids = tokens(2, 30)
    cache = ours.new_cache(capacity=30, batch_size=2)
    pieces = [ours(piece, cache=cache) for piece in ids.split([12, 1, 1, 5, 1, 10], dim=1)]
    assert cache.length == 30
    assert_close(ours.logits(torch.cat(pieces, 1)), theirs(ids).logits)


@pytest.mark.parametrize("name", ["llama3.2", "mistral", "biases"])
@torch.no_grad()
def test_transformers_loads_what_we_save(pair, tmp_path, name):
    theirs, ours, spec = pair(CONFIGS[name])
    native.save(ours, spec, tmp_path, config=CONFIGS[name].to_dict(), max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = type(theirs).from_pretrained(tmp_path)
    for key, parameter in theirs.named_parameters():
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
