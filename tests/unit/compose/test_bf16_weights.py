"""Trained weights in bf16: which parameters are, and that no forward or backward casts one again."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.adapters.fused_block import fuse_blocks
from stoker.arch import arithmetic, families
from stoker.compose.trainer import widen_vectors
from stoker.models import native
from stoker.plan.memory import num_matrix_parameters
from stoker.tasks.supervised import SupervisedTask

CONFIG = {
    "model_type": "qwen2",  # whose q, k and v have biases
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


class Batch:
    input_ids = torch.arange(26).view(2, 13)
    targets = torch.arange(1, 27).view(2, 13)
    document_lengths = None
    num_trained_tokens = 26


class Casts(TorchDispatchMode):
    """Collects the shapes of tensors that are copied from one float type to another."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.shapes.append(tuple(args[0].shape))
        return result


def _model(dtype, **changes):
    spec = families.read(CONFIG | changes, "config.json")
    model = native.build(spec, dtype=dtype, seed=1)
    widen_vectors(model)
    return model, spec


def _gradients(model):
    """The loss and every gradient of a backward in bf16, and the shapes that were cast."""
    with Casts() as casts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = SupervisedTask(model)(Batch()).loss_sum
        loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters()}, set(casts.shapes)


@pytest.mark.parametrize("fused", [False, True])
def test_matrices_are_bf16_and_never_cast_and_gradients_are_theirs(fused):
    model, _ = _model(torch.bfloat16)
    if fused:
        fuse_blocks(model, implementation="reference")
    loss, grads, shapes = _gradients(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32), name
        assert grads[name].dtype == parameter.dtype, name
    linear = {tuple(one.shape) for name, one in model.named_parameters() if one.ndim > 1 and "embed" not in name}
    linear.discard(tuple(model.head_weight.shape))  # whose gradient is summed in fp32 and then rounded
    assert not shapes & (linear | {shape[::-1] for shape in linear})

    exact, _ = _model(torch.float32)
    exact.load_state_dict(model.state_dict())
    if fused:
        fuse_blocks(exact, implementation="reference")
    true_loss, true_grads, _ = _gradients(exact)
    assert loss == pytest.approx(true_loss, rel=5e-3)
    for name, true in true_grads.items():
        error = (grads[name].float() - true).norm() / true.norm()
        assert error < 0.05, name


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_counts_the_parameters_that_are_bf16(tied):
    model, spec = _model(torch.bfloat16, tie_word_embeddings=tied)
    narrow = sum(one.numel() for one in model.parameters() if one.dtype == torch.bfloat16)
    assert num_matrix_parameters(spec) == narrow < arithmetic.num_parameters(spec)
