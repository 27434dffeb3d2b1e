import pytest
import torch
from torch.nn import Parameter

from stoker.optim.groups import by_decay, decays, is_hidden_matrix

MATRIX, VECTOR = Parameter(torch.zeros(2, 2)), Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "parameter", "expected"),
    [
        ("model.blocks.0.attention.qkv.weight", MATRIX, True),
        ("model.blocks.0.attention.qkv.lora_a", MATRIX, True),
        ("model.head.weight", MATRIX, True),
        ("model.embedding.weight", MATRIX, False),
        ("model.embed_tokens.weight", MATRIX, False),
        ("transformer.wte.weight", MATRIX, False),
        ("model.blocks.0.attention.qkv.bias", VECTOR, False),
        ("model.blocks.0.attention_norm.weight", VECTOR, False),
        ("model.blocks.0.mixer.in_proj.weight", MATRIX, True),
        ("model.blocks.0.mixer.A_log", MATRIX, False),
        ("backbone.layers.0.mixer.A_log", MATRIX, False),
    ],
)
def test_matrices_decay_and_norms_biases_embeddings_do_not(name, parameter, expected):
    assert decays(name, parameter) is expected


@pytest.mark.parametrize(
    "name",
    ["model.head.weight", "lm_head.weight", "model.embedding.weight", "embed_out.weight", "blocks.0.mixer.A_log"],
)
def test_embedding_head_and_decay_rates_are_not_hidden_matrices(name):
    assert not is_hidden_matrix(name, MATRIX)


def test_groups_split_by_decay_unless_all_decay():
    named = [("a.weight", MATRIX), ("a.bias", VECTOR)]
    split = by_decay(named, weight_decay=0.1, decay_all=False)
    assert [(group["params"], group["weight_decay"]) for group in split] == [([MATRIX], 0.1), ([VECTOR], 0.0)]
    together = by_decay(named, weight_decay=0.1, decay_all=True)
    assert [(len(group["params"]), group["weight_decay"]) for group in together] == [(2, 0.1)]
