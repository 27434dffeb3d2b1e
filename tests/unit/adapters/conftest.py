"""A small model of fused linear layers, as a decoder keeps them."""

import pytest
import torch
from torch import nn

from stoker.nn.linear import FusedLinear


class Block(nn.Module):
    def __init__(self, prefix):
        super().__init__()
        names = tuple(f"{prefix}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        self.qkv = FusedLinear(8, (8, 4, 4), names=names, bias=True)
        self.out = FusedLinear(8, (8,), names=(f"{prefix}.self_attn.o_proj",))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).split((8, 4, 4), dim=-1)
        return x + self.out(q * torch.tanh(torch.cat([k, v], dim=-1)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(f"model.layers.{index}") for index in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def make_model():
    def make(dtype=torch.float32):
        model, generator = Model(), torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(generator=generator).mul_(0.5)
        return model.to(dtype)

    return make


@pytest.fixture
def x():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def train():
    """Gives every trained parameter other values, so that no adapter is zero."""

    def change(model):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return model

    return change
