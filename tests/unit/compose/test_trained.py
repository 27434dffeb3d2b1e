import pytest
import torch

from stoker.adapters.lora import add_lora
from stoker.arch import families
from stoker.compose.trained import embedding_noise, keep_only, rate_scale
from stoker.config.load import parse
from stoker.errors import ConfigError
from stoker.models import native

SPEC = families.read(
    {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 32,
    },
    "config.json",
)


def train(**settings):
    return parse(
        {
            "model": {"base": "builtin:tiny-llama"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "train": {"learning_rate": 0.001, **settings},
            "output": {"folder": "x"},
            **({"adapter": {"rank": 2}} if "lora_plus_ratio" in settings else {}),
        }
    ).train


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_weights_that_a_pattern_matches_from_the_start_train():
    model = native.build(SPEC)

    numbers = keep_only(model, SPEC, [r"model\.layers\.1\.", r"lm_head"])

    names = trained(model)
    assert "head.weight" in names
    assert {name for name in names if name != "head.weight"} == {
        name for name, _ in model.named_parameters() if name.startswith("blocks.1.")
    }
    assert numbers == sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


def test_a_pattern_that_matches_nothing_is_refused_with_a_name_that_there_is():
    with pytest.raises(ConfigError, match=r"matches no weight. Names are such as model\.embed_tokens"):
        keep_only(native.build(SPEC), SPEC, [r"layers\.1"])


def test_a_part_of_a_fused_weight_is_refused():
    with pytest.raises(ConfigError, match=r"q_proj.*but not.*k_proj.*they are one weight"):
        keep_only(native.build(SPEC), SPEC, [r".*q_proj"])


def test_frozen_weights_get_no_gradient():
    model = native.build(SPEC)
    keep_only(model, SPEC, [r".*\.mlp\."])

    model.logits(model(torch.tensor([[1, 2, 3]]))).sum().backward()

    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained(model)


def test_embedding_and_head_have_a_rate_of_their_own():
    scale = rate_scale(train(embedding_learning_rate=0.0001))

    assert [scale(name) for name in ("model.embedding.weight", "model.head.weight")] == [pytest.approx(0.1)] * 2
    assert scale("model.blocks.0.attention.qkv.weight") == 1.0


def test_lora_plus_trains_b_faster_than_a():
    scale = rate_scale(train(lora_plus_ratio=16.0))
    model = native.build(SPEC)
    add_lora(model, rank=2, alpha=4)

    scales = {name.rpartition(".")[2]: scale(name) for name in trained(model)}

    assert scales == {"lora_a": 1.0, "lora_b": 16.0}


def test_without_either_all_have_the_same_rate():
    assert rate_scale(train()) is None


def test_noise_is_within_its_bounds_in_training_alone():
    model = native.build(SPEC)
    ids = torch.arange(16)[None]
    clean = model.embedding(ids)
    bound = 5 / (16 * 8) ** 0.5

    with embedding_noise(model, 5.0):
        noise = model.embedding(ids) - clean
        model.eval()
        assert torch.equal(model.embedding(ids), clean)
    model.train()

    assert 0.9 * bound < noise.abs().max() <= bound + 1e-6
    assert abs(noise.mean()) < 0.3 * bound
    assert torch.equal(model.embedding(ids), clean)
