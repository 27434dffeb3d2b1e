import pytest
import torch
from torch import nn

from stoker.data.batch import Batch
from stoker.tasks.supervised import SupervisedTask


class Toy(nn.Module):
    """The interface of a decoder: hidden states from ids, and a head kept apart."""

    logit_scale = 1.0
    logit_softcap = None

    def __init__(self, *, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.head_bias = nn.Parameter(torch.randn(16)) if bias else None
        self.seen = None

    @property
    def head_weight(self):
        return self.embedding.weight

    def forward(self, input_ids, *, document_lengths=None):
        self.seen = document_lengths
        return self.embedding(input_ids).cumsum(1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 16, (2, 6), generator=generator)
    targets[:, ::2] = -100
    return Batch(torch.randint(0, 16, (2, 6), generator=generator), targets, ((2, 4), (6,)), 12, 6)


@pytest.mark.parametrize("bias", [False, True])
def test_loss_is_the_sum_of_cross_entropy_over_trained_targets(batch, bias):
    model = Toy(bias=bias)
    result = SupervisedTask(model)(batch)
    logits = nn.functional.linear(model(batch.input_ids), model.head_weight, model.head_bias)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(result.loss_sum, expected)
    assert result.num_trained_tokens == 6
    ours = torch.autograd.grad(result.loss_sum, model.embedding.weight)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, model.embedding.weight)[0])


def test_document_lengths_reach_the_model(batch):
    model = Toy()
    SupervisedTask(model)(batch)
    assert model.seen == ((2, 4), (6,))


def test_a_batch_without_a_trained_token_costs_nothing(batch):
    model = Toy()
    empty = Batch(batch.input_ids, torch.full_like(batch.targets, -100), None, 12, 0)
    result = SupervisedTask(model)(empty)
    result.loss_sum.backward()
    assert result.loss_sum == 0
    assert model.embedding.weight.grad.abs().sum() == 0


def test_kernels_names_the_implementation_of_the_loss(batch):
    with pytest.raises(ValueError, match="no-such-kernel"):
        SupervisedTask(Toy(), kernels="no-such-kernel")(batch)
