import pytest
import torch

from stoker.nn.attention import Attention
from stoker.nn.block import Block
from stoker.nn.decoder import Decoder
from stoker.nn.feed_forward import GatedFeedForward
from stoker.nn.norm import RmsNorm
from stoker.nn.rotary import Rotary


@pytest.fixture
def make_decoder():
    """A function that builds a small decoder with random weights from a fixed seed."""

    def block(rotary, window):
        attention = Attention(
            16,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            rotary=rotary,
            qkv_names=("q", "k", "v"),
            out_names=("o",),
            window=window,
        )
        feed_forward = GatedFeedForward(16, intermediate_size=24, gate_up_names=("gate", "up"), down_names=("down",))
        return Block(
            attention,
            feed_forward,
            attention_norm=RmsNorm(16, epsilon=1e-6),
            feed_forward_norm=RmsNorm(16, epsilon=1e-6),
        )

    def make(*, rotaries=None, window=None, **options):
        rotaries = rotaries or [Rotary(4, theta=1e4)] * 2
        blocks = [block(rotary, window) for rotary in rotaries]
        decoder = Decoder(40, 16, blocks=blocks, final_norm=RmsNorm(16, epsilon=1e-6), **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        return decoder

    return make


@pytest.fixture
def ids():
    return torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
