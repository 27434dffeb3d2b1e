import pytest
import torch
from safetensors.torch import load_file

from stoker.arch.families import read
from stoker.errors import ModelError
from stoker.models import native


def load(folder, config, **options):
    return native.load(folder, read(config, "config.json"), **options)


def test_shards_and_one_file_load_the_same(folder, sharded, config):
    one, several = load(folder, config), load(sharded, config)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), several.parameters(), strict=True))
    built = native.build(read(config, "config.json"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), built.parameters(), strict=True))


def test_weights_are_cast_on_the_way(folder, config):
    assert {p.dtype for p in load(folder, config, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_all_wrong_tensors_are_named_at_once(folder, config, change_tensors):
    changes = {
        "model.norm.weight": None,
        "lm_head.weight": None,
        "model.layers.0.self_attn.q_proj.bias": torch.ones(16),
    }
    change_tensors(folder, changes)
    with pytest.raises(ModelError) as error:
        load(folder, config)
    message = str(error.value)
    assert "tensor model.norm.weight is missing" in message
    assert "tensor lm_head.weight is missing" in message
    assert "tensor model.layers.0.self_attn.q_proj.bias is not part of this architecture" in message
    assert str(folder) in message


def test_a_misshapen_tensor_is_named_with_both_shapes(folder, config, change_tensors):
    change_tensors(folder, {"model.layers.1.self_attn.k_proj.weight": torch.ones(16, 16)})
    with pytest.raises(ModelError, match=r"k_proj\.weight has shape \[16, 16\], but config\.json makes it \[8, 16\]"):
        load(folder, config)


def test_a_long_list_of_problems_is_cut(folder, config):
    with pytest.raises(ModelError, match="tensors more are wrong") as error:
        load(folder, config | {"num_hidden_layers": 6})
    assert len(error.value.problems) < 20


def test_rotary_buffers_of_old_checkpoints_are_no_weights(folder, config, change_tensors):
    change_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert load(folder, config) is not None


def test_a_tied_matrix_is_found_under_either_name(folder, config, change_tensors):
    tied = config | {"tie_word_embeddings": True}
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    with pytest.raises(ModelError, match=r"ties the head .* lm_head\.weight differs"):
        load(folder, tied)
    change_tensors(folder, {"lm_head.weight": embedding.clone()})
    assert torch.equal(load(folder, tied).head_weight, embedding)
    change_tensors(folder, {"model.embed_tokens.weight": None})
    assert torch.equal(load(folder, tied).embedding.weight, embedding)
    change_tensors(folder, {"model.embed_tokens.weight": embedding, "lm_head.weight": None})
    assert torch.equal(load(folder, tied).embedding.weight, embedding)
    change_tensors(folder, {"model.embed_tokens.weight": None})
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight is missing"):
        load(folder, tied)


def test_no_memory_is_taken_before_the_shapes_are_known_to_fit(folder, config, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *args, **options: pytest.fail("took memory"))
    with pytest.raises(ModelError):
        load(folder, config | {"intermediate_size": 25})
