import pytest
import torch
from torch import nn

from stoker.distributed.recompute import recompute_blocks


def test_every_block_is_told_to_recompute():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    for block in model.blocks:
        block.recompute = False
    assert recompute_blocks(model) == 2
    assert all(block.recompute for block in model.blocks)


def test_blocks_without_the_switch_are_refused():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="Linear has no switch"):
        recompute_blocks(model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_a_decoder_stay_the_same(dropout):
    from stoker.arch import families
    from stoker.models import native

    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    model = native.build(families.read(config, "config.json"), device="cpu", dtype=torch.float32)
    for block in model.blocks:
        block.feed_forward.register_forward_hook(
            lambda module, inputs, output: nn.functional.dropout(output, dropout, training=True)
        )
    ids = torch.arange(12).reshape(2, 6)

    def gradient():
        model.zero_grad()
        torch.manual_seed(0)
        model(ids).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.blocks.parameters()]

    kept = gradient()
    calls = []
    model.blocks[0].attention.register_forward_hook(lambda *_: calls.append(1))
    recompute_blocks(model)
    recomputed = gradient()
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
