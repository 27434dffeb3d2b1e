import pytest

from stoker.arch import arithmetic
from stoker.config.schema import Adafactor, AdamW, AdamW8bit, Muon, Sgd
from stoker.plan.memory import estimate, optimizer_bytes


def _estimate(spec, **changes):
    arguments = {
        "trained": 0,
        "frozen": arithmetic.num_parameters(spec),
        "optimizer": AdamW(),
        "tokens": 2048,
        "precision": "bf16",
        "recompute": "none",
        "device": "cuda",
    }
    return estimate(spec, **(arguments | changes))


def test_a_frozen_base_takes_the_compute_types_bytes(llama_8b):
    count = arithmetic.num_parameters(llama_8b)
    assert _estimate(llama_8b).weights == 2 * count
    assert _estimate(llama_8b, precision="fp32").weights == 4 * count


def test_full_training_with_adamw_takes_16_bytes_a_parameter_in_fp32(llama_8b):
    # Weight, gradient and two averages of 4 bytes each.
    count = arithmetic.num_parameters(llama_8b)
    memory = _estimate(llama_8b, trained=count, frozen=0, precision="fp32")
    assert memory.weights + memory.gradients + memory.optimizer == 16 * count


def test_recompute_and_fewer_tokens_keep_less(llama_8b):
    whole = _estimate(llama_8b).activations
    assert _estimate(llama_8b, recompute="block").activations < whole / 4
    assert _estimate(llama_8b, tokens=1024).activations == pytest.approx(whole / 2)


def test_logits_are_bounded_however_many_tokens(llama_8b):
    # Only the gradient of the hidden states grows: 4 bytes for each of 4096 channels and token.
    growth = _estimate(llama_8b, tokens=65536).logits - _estimate(llama_8b, tokens=32768).logits
    assert growth == 32768 * 4096 * 4


def test_the_total_is_the_sum(llama_8b):
    memory = _estimate(llama_8b)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.reserve)
    assert memory.total == sum(parts)


def test_optimizers_differ_by_their_state():
    assert optimizer_bytes(AdamW()) == 8
    assert 2 < optimizer_bytes(AdamW8bit()) < 2.1
    assert optimizer_bytes(Sgd()) == 0
    assert optimizer_bytes(Sgd(momentum=0.9)) == 4
    assert optimizer_bytes(Adafactor()) < 0.1
    assert optimizer_bytes(Muon()) <= 8


def test_autocast_holds_a_copy_of_each_trained_weight(llama_8b):
    half = _estimate(llama_8b, trained=1000, frozen=0)
    assert half.weights == 1000 * (4 + 2)
