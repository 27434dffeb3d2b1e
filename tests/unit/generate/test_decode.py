import pytest
import torch

from stoker.arch.families import read
from stoker.generate.decode import generate
from stoker.models import native

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def model():
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    return native.build(read(config, "config.json"), seed=1, initializer_range=0.3)


def greedy_without_cache(model, num_tokens):
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(PROMPT) :]


def test_greedy_with_the_cache_equals_decoding_without_one(model):
    tokens = list(generate(model, PROMPT, max_new_tokens=20))
    assert tokens == greedy_without_cache(model, 20)
    assert len(set(tokens)) > 3


def test_it_ends_before_a_stop_token(model):
    tokens = list(generate(model, PROMPT, max_new_tokens=20))
    stop = tokens[7]
    assert list(generate(model, PROMPT, max_new_tokens=20, stop_ids=[stop])) == tokens[: tokens.index(stop)]


def test_a_seed_repeats_its_tokens_and_leaves_the_global_generator_alone(model):
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = list(generate(model, PROMPT, seed=1, **options))
    unseeded = {tuple(generate(model, PROMPT, **options)) for _ in range(3)}
    assert torch.equal(torch.rand(2), expected)
    assert first == list(generate(model, PROMPT, seed=1, **options))
    assert first != list(generate(model, PROMPT, seed=2, **options))
    assert len(unseeded) > 1


def test_repetition_penalty_counts_prompt_and_new_tokens(model):
    plain = list(generate(model, PROMPT, max_new_tokens=20))
    tokens = list(generate(model, PROMPT, max_new_tokens=20, repetition_penalty=1e9))
    assert len(set(plain)) < 20
    assert len(set(tokens)) == 20
    assert not set(tokens) & set(PROMPT)


def test_training_mode_and_gradients_are_as_before_whenever_it_ends(model):
    model.train()
    tokens = generate(model, PROMPT, max_new_tokens=5)
    next(tokens)
    assert not model.training
    assert torch.is_grad_enabled()
    tokens.close()
    assert model.training
    list(generate(model, PROMPT, max_new_tokens=2))
    assert model.training
    model.eval()
    list(generate(model, PROMPT, max_new_tokens=2))
    assert not model.training


def test_no_tokens_are_made_when_none_are_asked_for(model):
    assert list(generate(model, PROMPT, max_new_tokens=0)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([3, 64], {}, "id 64 is outside the vocabulary of 64"),
        ([-1], {}, "id -1 is outside"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens = -1"),
        ([1], {"temperature": -0.5}, "temperature"),
    ],
)
def test_mistakes_are_refused_at_the_call(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **{"max_new_tokens": 1, **options})
