"""Documents as a tensor of a fixed size: models of every kind compute what they do with documents' lengths."""

from dataclasses import replace

import pytest
import torch

from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.data.batch import Batch
from stoker.distributed.graph_shapes import ends_of
from stoker.models import native
from stoker.tasks.supervised import SupervisedTask

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"model_type": "llama", "intermediate_size": 24, "max_position_embeddings": 64} | HEADS
MODELS = {
    "llama": LLAMA,
    "angles by length": LLAMA
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "windows": LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "soft-caps": {"model_type": "gemma2", "intermediate_size": 24, "head_dim": 8, "sliding_window": 5} | HEADS,
    "learned positions": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "mamba": {"model_type": "mamba", "intermediate_size": 32, "state_size": 4},
    "mamba2": {"model_type": "mamba2", "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4},
}
DOCUMENTS = ((3, 17, 4), (24,), (12, 12))


def task_of(config, *, fused=False):
    model = native.build(read(SIZES | config, "config.json"), seed=3)
    add_lora(model, rank=2, alpha=4)
    if fused:
        fuse_blocks(model, implementation="reference", keep="attention")
    return SupervisedTask(model)


def batch_of(documents, seed=0):
    width = sum(documents[0])
    ids = torch.randint(0, 40, (len(documents), width), generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1, 1)
    for number, row in enumerate(documents):
        targets[number, torch.tensor(row).cumsum(0) - 1] = -100
    targets[0, :5] = -100
    return Batch(ids, targets, documents, ids.numel(), int((targets != -100).sum()))


def loss_and_gradients(task, batch):
    loss = task(batch).loss_sum
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    return [loss, *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_lengths_and_of_each_document_alone(name):
    task, batch = task_of(MODELS[name]), batch_of(DOCUMENTS)
    expected = loss_and_gradients(task, batch)
    with task.capturing(66, torch.tensor(ends_of(DOCUMENTS, 9), dtype=torch.int32), 24):
        found = loss_and_gradients(task, batch)
    alone = None
    for row, sizes in enumerate(DOCUMENTS):
        for ids, targets in zip(batch.input_ids[row].split(sizes), batch.targets[row].split(sizes), strict=True):
            one = loss_and_gradients(task, Batch(ids[None], targets[None], None, len(ids), 1))
            alone = one if alone is None else [x + y for x, y in zip(alone, one, strict=True)]
    for one, other, sole in zip(found, expected, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one, sole, rtol=1e-4, atol=1e-5)  # sums in another order


def test_the_layer_kernel_takes_boundaries_too():
    task, batch = task_of(LLAMA, fused=True), batch_of(DOCUMENTS)
    expected = loss_and_gradients(task, batch)
    with task.capturing(66, torch.tensor(ends_of(DOCUMENTS, 8), dtype=torch.int32), 24):
        found = loss_and_gradients(task, batch)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert batch.num_trained_tokens < 66  # of 72 positions; so many may be trained
    with task.capturing(66):
        one = loss_and_gradients(task, replace(batch, document_lengths=None))
    for found, wanted in zip(one, loss_and_gradients(task, replace(batch, document_lengths=None)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    # Other boundaries are other documents: they are what counts within.
    with task.capturing(66, torch.tensor(ends_of(((24,),) * 3, 8), dtype=torch.int32), 24):
        assert (task(batch).loss_sum - expected[0]).abs() > 1e-3
