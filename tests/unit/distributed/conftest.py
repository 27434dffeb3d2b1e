"""A toy task with dropout and a strategy around it."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from stoker.compose.updates import eight_bit
from stoker.distributed.single import SingleDevice
from stoker.optim import optimizers


class ToyResult(NamedTuple):
    loss_sum: torch.Tensor
    num_trained_tokens: int
    metrics: dict


@dataclass(frozen=True)
class ToyBatch:
    x: torch.Tensor
    y: torch.Tensor

    def to(self, device):
        return ToyBatch(self.x.to(device), self.y.to(device))

    def shortened(self):
        return ToyBatch(self.x[:1], self.y[:1])

    @staticmethod
    def random(rows, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return ToyBatch(torch.randn(rows, 64, generator=generator), torch.randn(rows, 8, generator=generator))


class ToyTask(nn.Module):
    """Squared error of a small network; 64 x 64 weights are large enough for 8-bit optimiser states."""

    def __init__(self, *, dropout=0.0):
        super().__init__()
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(64, 64)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(64, 8, bias=False)

    def forward(self, batch):
        hidden = self.dropout(torch.relu(self.hidden(self.frozen(batch.x))))
        error = (self.out(hidden).float() - batch.y).square()
        return ToyResult(error.sum(), error.numel(), {"largest": error.max().detach()})


def make_strategy(kind="adamw", *, precision="fp32", dropout=0.0, seed=0, device="cpu"):
    torch.manual_seed(seed)
    strategy = SingleDevice(device, precision=precision)
    task = ToyTask(dropout=dropout)
    strategy.prepare(task, partial(optimizers.build, kind=kind, learning_rate=1e-2, eight_bit=eight_bit("reference")))
    return strategy, task


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are several times slower when two threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy_batch():
    return ToyBatch.random


@pytest.fixture
def toy_strategy():
    return make_strategy
