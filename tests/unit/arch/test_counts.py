"""What `arch` counts of published shapes against counts of the modules themselves, most on the meta device."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stoker.arch import arithmetic, shapes
from stoker.arch.parts import parts
from stoker.models.build import on_meta

ROWS, LENGTH = 2, 256
TOKENS = ROWS * LENGTH
DENSE = ("llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "gemma-2-9b", "phi-4", "mistral-nemo-12b")


def model_of(name, layers=None):
    spec = shapes.spec(name)
    spec = spec if layers is None else replace(spec, layers=spec.layers[:layers])
    return spec, on_meta(spec, dtype=torch.float32, kernels="reference")


def ids():
    return torch.empty((ROWS, LENGTH), dtype=torch.long, device="meta")


@pytest.mark.parametrize(
    "name", [*DENSE, "llama-3.1-405b", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "mamba-2.8b", "gpt2"]
)
def test_parameters_are_exactly_those_of_the_modules(name):
    spec, model = model_of(name)
    assert arithmetic.num_parameters(spec) == sum(p.numel() for p in model.parameters())


def counted(spec, model):
    """FLOPs of a forward, and of forward and backward, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        logits = model.logits(model(ids()))
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops()


def as_torch_counts(spec, flops):
    """Attention with what lies above the diagonal, which torch counts and a causal kernel does not compute."""
    mixing = sum(
        part.flops(LENGTH)
        for layer in spec.layers
        for name, part in parts(layer, spec.hidden_size).items()
        if name == "attention"
    )
    return flops + mixing * (2 * LENGTH / (LENGTH + 1) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DENSE, "mamba-2.8b"])
def test_flops_of_a_forward_are_those_that_torch_counts(name):
    spec, model = model_of(name, layers=2)
    forward, _ = counted(spec, model)
    ours = as_torch_counts(spec, arithmetic.flops_per_token(spec, LENGTH)) * TOKENS
    assert forward == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b"])
def test_flops_of_training_are_those_that_torch_counts(name):
    spec, model = model_of(name, layers=2)
    _, whole = counted(spec, model)
    forward = as_torch_counts(spec, arithmetic.flops_per_token(spec, LENGTH))
    assert whole == pytest.approx(3 * forward * TOKENS, rel=0.01)


def test_flops_over_a_frozen_base_are_those_that_torch_counts():
    spec, model = model_of("llama-3.1-8b", layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "embedding.weight")  # looking up costs nothing, and all layers need gradients
    _, whole = counted(spec, model)
    ours = arithmetic.training_flops_per_token(spec, LENGTH, frozen_base=True)
    above = as_torch_counts(spec, 0.0)
    assert whole == pytest.approx((ours + 3 * above) * TOKENS, rel=0.01)
