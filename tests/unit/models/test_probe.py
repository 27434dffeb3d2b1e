import pytest
import torch

from stoker.arch.families import read
from stoker.models.probe import Probe

CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
CPU = torch.device("cpu")


@pytest.fixture
def probe():
    spec = read(CONFIG | {"num_attention_heads": 4, "num_key_value_heads": 2}, "config.json")
    return Probe(spec, lambda name: torch.full((16,), {"a": 2.0, "f": 3.0}[name.split(".")[2][0]]))


def test_inputs_of_a_normed_layer_have_the_norms_scale(probe):
    plain = probe.inputs("blocks.0.attention.other", 16, device=CPU)
    assert torch.equal(probe.inputs("blocks.0.attention.qkv", 16, device=CPU), 2 * plain)
    assert torch.equal(probe.inputs("blocks.1.feed_forward.gate_up", 16, device=CPU), 3 * plain)


def test_the_output_projection_reads_v_of_the_layer_before(probe):
    qkv = torch.arange(32 * 32.0).view(32, 32)  # 16 of q, 8 of k, 8 of v: two heads of four channels
    probe.saw("blocks.0.attention.qkv", qkv)
    inputs = probe.inputs("blocks.0.attention.out", 16, device=CPU)
    first, second = qkv[:, 24:28], qkv[:, 28:]
    assert torch.equal(inputs, torch.cat([first, first, second, second], dim=1))  # two query heads share one of v


def test_down_reads_the_gated_product_of_the_layer_before(probe):
    gate, up = torch.randn(32, 24), torch.randn(32, 24)
    probe.saw("blocks.0.feed_forward.gate_up", torch.cat([gate, up], dim=1))
    inputs = probe.inputs("blocks.0.feed_forward.down", 24, device=CPU)
    torch.testing.assert_close(inputs, torch.nn.functional.silu(gate) * up)  # fp32, silu of a view in another order


def test_a_layer_whose_forerunner_was_not_seen_reads_noise(probe):
    noise = probe.inputs("blocks.0.attention.out", 16, device=CPU)
    assert noise.std() == pytest.approx(1.0, abs=0.15)  # 512 values
    assert torch.equal(noise, probe.inputs("blocks.0.attention.out", 16, device=CPU))
