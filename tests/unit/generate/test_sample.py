import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stoker.generate.sample import Sampling, next_token, probabilities

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3


def draw(logits, sampling, *, seen=(), seed=0):
    return next_token(logits, sampling, seen=seen, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 999, "top_p": 1.0},
    ],
)
def test_distribution_equals_transformers(options):
    steps = [TemperatureLogitsWarper(options["temperature"])] if options["temperature"] != 1.0 else []
    steps += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    steps += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    expected = LogitsProcessorList(steps)(torch.zeros(1, 1).long(), LOGITS[None])[0].softmax(-1)
    torch.testing.assert_close(probabilities(LOGITS, Sampling(**options)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, -20.0], ids=["positive", "negative"])
@pytest.mark.parametrize("penalty", [1.2, 3.0, 0.5])
def test_repetition_penalty_chooses_what_transformers_would(shift, penalty):
    logits = LOGITS + shift
    seen = logits.topk(3).indices.tolist() + logits.topk(3, largest=False).indices.tolist()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None])[0].argmax()
    assert draw(logits, Sampling(repetition_penalty=penalty), seen=seen) == expected
    assert (expected == logits.argmax()) == (penalty < 3.0)


def test_greedy_takes_the_likeliest_whatever_the_seed():
    assert {draw(LOGITS, Sampling(top_k=3, top_p=0.5), seed=seed) for seed in range(5)} == {int(LOGITS.argmax())}


def test_top_p_always_keeps_one_token():
    assert draw(LOGITS, Sampling(temperature=2.0, top_p=1e-6)) == LOGITS.argmax()


def test_a_tiny_temperature_is_greedy_without_overflow():
    assert draw(LOGITS * 1e30, Sampling(temperature=1e-30)) == LOGITS.argmax()


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [next_token(logits, Sampling(temperature=1.0), seen=(), generator=generator) for _ in range(3000)]
    shares = torch.tensor(drawn).bincount(minlength=3) / 3000
    # Three standard deviations of a share over 3000 draws are at most 0.027.
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=0.027)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}]
)
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
