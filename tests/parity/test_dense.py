"""The dense families against Transformers on tiny random checkpoints: one line a variant, all checks of the oracle."""

import copy
import warnings

import pytest
import torch
from oracle import CHECKS, assert_close, every_check, pair
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from stoker.arch import families
from stoker.errors import ModelError
from stoker.export import adapter
from stoker.export.merged import merge
from stoker.models import native
from stoker.models.folder import read_config
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear

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
GPT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 12, "num_hidden_layers": 3, "sliding_window": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 3.0],
}
CASES = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "qwen3 biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
    "gemma": GemmaConfig(**SIZES, head_dim=12),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(
        **GEMMA,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma3 capped": Gemma3TextConfig(**GEMMA, sliding_window_pattern=2, final_logit_softcapping=3.0),
    "phi3": Phi3Config(**SIZES),
    "phi3 window": Phi3Config(**SIZES, sliding_window=8),
    "phi4 mini": Phi3Config(
        **{**SIZES, "max_position_embeddings": 256},
        original_max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={**LONGROPE, "partial_rotary_factor": 0.75},
    ),
    "phi": PhiConfig(**SIZES),
    "phi qk norm": PhiConfig(**SIZES, qk_layernorm=True),
    "falcon 7b": FalconConfig(**GPT, num_kv_heads=1),
    "falcon 40b": FalconConfig(**GPT, num_kv_heads=2, new_decoder_architecture=True),
    "falcon 11b": FalconConfig(
        **GPT, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, tie_word_embeddings=False
    ),
    "falcon biases": FalconConfig(**GPT, multi_query=False, parallel_attn=False, bias=True),
    "gpt neox": GPTNeoXConfig(**GPT, intermediate_size=48, rope_parameters={"partial_rotary_factor": 0.5}),
    "gpt neox in turn": GPTNeoXConfig(**GPT, intermediate_size=48, use_parallel_residual=False, attention_bias=False),
    "gpt2": GPT2Config(**GPT, **NO_DROPOUT, n_positions=64),
    "gpt2 scales": GPT2Config(**GPT, **NO_DROPOUT, n_positions=64, n_inner=40, scale_attn_by_inverse_layer_idx=True),
}


@pytest.mark.parametrize(("name", "check"), every_check(CASES))
def test_a_family_computes_what_transformers_does(name, check):
    CHECKS[check](pair(CASES[name]))


@torch.no_grad()
def test_longrope_changes_its_factors_past_the_original_context():
    models = pair(CASES["phi4 mini"])
    for length in (64, 65, 100):
        ids = models.tokens(1, length)
        assert_close(models.ours.logits(models.ours(ids)), models.theirs(ids, use_cache=False).logits)
    ids = models.tokens(1, 100)
    packed = models.ours.logits(models.ours(ids, document_lengths=((70, 30),)))
    for document, found in zip(ids[0].split((70, 30)), packed[0].split((70, 30)), strict=True):
        assert_close(found, models.theirs(document[None], use_cache=False).logits[0])


@torch.no_grad()
def test_decoding_past_the_original_context_of_longrope_equals_transformers():
    models = pair(CASES["phi4 mini"])
    CHECKS["generation"](models, prompt_tokens=58, new_tokens=16)
    ids = models.tokens(2, 80)
    cache = models.ours.new_cache(capacity=80, batch_size=2)
    pieces = [models.ours(piece, cache=cache) for piece in ids.split([60, 1, 3, 1, 15], dim=1)]
    assert [piece.shape[1] for piece in pieces] == [60, 1, 3, 1, 15]
    expected = models.theirs(ids, use_cache=False).logits
    assert_close(models.ours.logits(torch.cat(pieces[3:], 1)), expected[:, 64:])


@pytest.mark.parametrize("targets", [["qkv_proj"], ["qkv_proj", "down_proj"]])
def test_adapters_of_some_layers_of_phi3_load_in_peft(targets):
    CHECKS["lora"](pair(CASES["phi3"]), targets)


@pytest.mark.parametrize("kind", sorted({type(config) for config in CASES.values()}, key=lambda kind: kind.__name__))
def test_absent_keys_take_transformers_defaults(kind):
    written = kind().to_dict()
    assert families.read({"model_type": written["model_type"]}, "") == families.read(written, "config.json")


def test_the_old_form_of_settings_reads_the_same():
    new = Gemma3TextConfig(
        **GEMMA, rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0}}
    ).to_dict()
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert families.read(old, "config.json") == families.read(new, "config.json")
    new = CASES["phi4 mini"].to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = {"type": "su", "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]}
    old |= {"partial_rotary_factor": 0.75, "rope_theta": 1e4, "rope_scaling": scaling}
    assert families.read(old, "config.json") == families.read(new, "config.json")
    new = CASES["gpt neox"].to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rotary_pct": 0.5, "rotary_emb_base": 10000}
    assert families.read(old, "config.json") == families.read(new, "config.json")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("falcon 7b", {"alibi": True}, "alibi"),
        ("falcon 40b", {"parallel_attn": False}, "do not go together"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("phi", {"hidden_act": "mish"}, "mish"),
        ("phi4 mini", {"rope_parameters": {**LONGROPE, "short_factor": [1.0]}}, "short_factor must list 4 numbers"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt neox", {"hidden_dropout": 0.1}, "hidden_dropout"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(name, changes, message):
    with pytest.raises(ModelError, match=message):
        families.read(CASES[name].to_dict() | changes, "config.json")


def test_dropout_of_published_configurations_is_named_as_left_out():
    assert families.read({"model_type": "gpt2"}, "").left_out[0] == "resid_pdrop = 0.1"
    assert families.read(CASES["gpt2"].to_dict(), "").left_out == ()


def test_a_folder_of_a_bare_gpt2_with_its_masks_loads(tmp_path):
    """As the oldest folders on the Hub are: no common first name, and causal masks among the weights."""
    from safetensors.torch import load_file, save_file

    models = pair(CASES["gpt2"])
    tensors = load_file(models.folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "model.safetensors")
    ours = native.load(tmp_path, models.spec)
    for one, other in zip(ours.parameters(), models.ours.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["gpt2", "gpt neox", "falcon 40b", "phi3"])
def test_adapters_that_peft_made_on_fused_layers_load_and_merge(name, kind, tmp_path):
    models = pair(CASES[name])
    settings = LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=kind == "dora"
    )
    ids, generator = models.tokens(2, 16), torch.Generator().manual_seed(2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT speaks of Conv1D
        theirs = get_peft_model(copy.deepcopy(models.theirs), settings).eval()
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        theirs.save_pretrained(tmp_path / "adapter")
        expected = theirs(input_ids=ids, use_cache=False).logits
    ours = models.fresh()
    adapter.load(ours, tmp_path / "adapter")
    merge(models.folder, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_close(ours.eval().logits(ours(ids)), expected)
        assert_close(merged(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(("quantization", "allowed"), [("int8", 0.03), ("fp8", 0.2)])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "phi3", "phi", "falcon 7b", "falcon 40b", "gpt2"])
@torch.no_grad()
def test_frozen_formats_take_every_layer_and_keep_the_logits(name, quantization, allowed):
    """Tiny layers average out little: of models of ordinary width, the formats move logits much less."""
    models = pair(CASES[name])
    model = models.fresh(quantization=quantization)
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == sum(isinstance(module, FusedLinear) for module in models.ours.modules())
    ids = models.tokens(2, 12)
    expected = models.ours.logits(models.ours(ids))
    difference = (model.logits(model(ids)) - expected).norm() / expected.norm()
    assert 0 < difference < allowed


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_folders_that_bitsandbytes_wrote_load_as_they_are(name, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    wide = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    config = type(CASES[name])(**{**CASES[name].to_dict(), **wide})
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        pair(config).folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path)
    spec = families.read(read_config(tmp_path), str(tmp_path))
    ours = native.load(tmp_path, spec, quantization="nf4")
    frozen = [module for module in ours.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == 8
    for layer in frozen:
        held = [theirs.get_submodule(key).weight for key in layer.names]
        values = [bitsandbytes.functional.dequantize_4bit(one.data, one.quant_state) for one in held]
        assert torch.equal(layer.weight, torch.cat(values))
