from dataclasses import asdict

import pytest

from stoker.arch import arithmetic, families
from stoker.config.schema import AdamW, Adapter
from stoker.plan.memory import (
    estimate,
    frozen_weight_bytes,
    num_matrix_parameters,
    transposed_bytes,
    workspace_bytes,
)


def _estimate(spec, **changes):
    arguments = {
        "trained": 0,
        "frozen": arithmetic.num_parameters(spec),
        "optimizer": AdamW(),
        "tokens": 2048,
        "precision": "bf16",
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


# Bytes of 8B's 6.98 billion linear weights (of 8.03): NF4 takes 4.129 bits each, int8 and fp8 a byte and a scale a row.
@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.129), ("int8", 8.007), ("fp8", 8.007)])
def test_a_quantized_base_takes_its_formats_bits_and_the_rest_the_compute_type(llama_8b, kind, bits):
    linear = sum(into * out for into, out in arithmetic.linear_shapes(llama_8b).values())
    rest = 2 * (arithmetic.num_parameters(llama_8b) - linear)
    assert _estimate(llama_8b, quantization=kind).weights == pytest.approx(linear * bits / 8 + rest, rel=1e-3)


def test_estimated_bytes_of_a_quantized_weight_are_those_that_it_takes():
    import torch

    from stoker.quant.formats import FORMATS, quantize

    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    spec = families.read(config | {"num_attention_heads": 4, "vocab_size": 32}, "config.json")
    shapes = arithmetic.linear_shapes(spec).values()
    rest = 2 * (arithmetic.num_parameters(spec) - sum(into * out for into, out in shapes))
    for kind in FORMATS:
        made = [quantize(torch.randn(out, into), kind) for into, out in shapes]
        tables = len(made) * (16 + 256) * 4 if kind == "nf4" else 0  # each NF4 weight has its codes beside it
        taken = sum(weight.num_bytes for weight in made) - tables
        assert frozen_weight_bytes(spec, kind, 2) - rest == pytest.approx(taken, rel=1e-3)


def test_scratch_holds_the_largest_weight_in_the_compute_type_or_fp8(llama_8b):
    gate_up = 4096 * 2 * 14336
    assert _estimate(llama_8b).scratch == 0
    assert _estimate(llama_8b, quantization="nf4").scratch == 2 * gate_up
    assert _estimate(llama_8b, quantization="int8", precision="fp32").scratch == 4 * gate_up
    assert _estimate(llama_8b, quantization="fp8").scratch == gate_up


def test_transposed_copies_take_a_byte_a_value_and_spare_the_scratch(llama_8b):
    bare = _estimate(llama_8b, quantization="fp8")
    kept = bare.with_transposed(transposed_bytes(llama_8b))
    assert kept.transposed == 32 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert kept.scratch == 0
    assert kept.total - bare.total == round(1.05 * (kept.transposed - bare.scratch))


def test_activations_are_added_with_what_the_allocator_loses(llama_8b):
    memory = _estimate(llama_8b)
    assert memory.with_activations(100 * 2**20).total - memory.total == 105 * 2**20


def test_layers_that_cast_on_their_own_hold_the_copies_of_one(llama_8b):
    whole = _estimate(llama_8b, trained=8 * 10**9, frozen=0)
    by_layer = _estimate(llama_8b, trained=8 * 10**9, frozen=0, casts_by_layer=True)
    assert whole.weights - by_layer.weights > 10 * 10**9


def test_logits_are_bounded_however_many_tokens(llama_8b):
    # Only what is as large as the hidden states grows: four tensors of 4096 channels a token.
    growth = _estimate(llama_8b, tokens=65536).logits - _estimate(llama_8b, tokens=32768).logits
    assert growth == 32768 * 4096 * 2 * 4


def test_the_total_is_the_sum(llama_8b):
    memory = _estimate(llama_8b)
    assert memory.total == sum(asdict(memory).values()) > memory.weights


def test_autocast_holds_a_copy_of_each_trained_weight(llama_8b):
    half = _estimate(llama_8b, trained=1000, frozen=0)
    assert half.weights == 1000 * (4 + 2)


def test_experts_are_cast_a_layer_at_a_time():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = heads | {"hidden_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96}
    spec = families.read({"model_type": "mixtral"} | sizes | experts, "config.json")
    count, of_experts = arithmetic.num_parameters(spec), 2 * 8 * 3 * 64 * 96
    full = _estimate(spec, trained=count, frozen=0)
    assert full.weights == 4 * count + 2 * (count - of_experts // 2)
    adapter = Adapter(rank=4, targets=["down_proj", "q_proj"])
    trained, of_experts = 2 * (4 * 8 * (96 + 64) + 4 * (64 + 64)), 2 * 4 * 8 * (96 + 64)
    lora = _estimate(spec, trained=trained, frozen=count, adapter=adapter)
    assert lora.weights == 2 * count + 4 * trained + 2 * (trained - of_experts // 2)


def test_cublas_has_a_workspace_for_each_of_two_threads():
    assert workspace_bytes((9, 0)) == workspace_bytes((12, 0)) == 64 * 2**20
    assert workspace_bytes((8, 0)) == workspace_bytes(None) == 2 * (4096 * 2 + 16 * 8) * 1024


def test_bf16_weights_take_8_bytes_a_parameter_and_norms_16(llama_8b):
    count, narrow = arithmetic.num_parameters(llama_8b), num_matrix_parameters(llama_8b)
    assert count - narrow == (2 * 32 + 1) * 4096
    memory = _estimate(llama_8b, trained=count, frozen=0, weight_dtype="bf16")
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(8 * narrow + 16 * (count - narrow))
    assert memory.logits == 0  # they are gone before the layers' gradients come


def test_logits_count_where_they_outweigh_all_gradients():
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    spec = families.read(config | {"num_attention_heads": 4, "vocab_size": 128256}, "config.json")
    memory = _estimate(spec, trained=arithmetic.num_parameters(spec), frozen=0, weight_dtype="bf16")
    assert memory.logits > 2 * 2**28 // 2 - memory.gradients + 4 * 64 * 128256 > 0
