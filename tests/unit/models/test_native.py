import torch

from stoker.arch.families import read
from stoker.models import native
from stoker.nn.linear import FusedLinear


def test_a_seed_gives_the_same_weights_in_every_dtype(config):
    spec = read(config, "config.json")
    one, other, half = (
        native.build(spec, seed=1),
        native.build(spec, seed=2),
        native.build(spec, seed=1, dtype=torch.half),
    )
    assert torch.equal(one.embedding.weight.half(), half.embedding.weight)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert 0.015 < one.embedding.weight.std() < 0.025
    assert torch.equal(one.final_norm.weight, torch.ones(16))


def test_linears_carry_their_hugging_face_names(config):
    model = native.build(read(config, "config.json"))
    names = [name for module in model.modules() if isinstance(module, FusedLinear) for name in module.names]
    assert len(names) == len(set(names)) == 14
    assert model.blocks[1].attention.qkv.names[2] == "model.layers.1.self_attn.v_proj"
    assert model.blocks[0].feed_forward.down.names == ("model.layers.0.mlp.down_proj",)


def test_tensors_split_back_to_hugging_face_rows(config):
    spec = read(config | {"attention_bias": True}, "config.json")
    model = native.build(spec)
    tensors = dict(native.hf_tensors(model, spec))
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (8, 16)
    assert torch.equal(tensors["model.layers.0.self_attn.k_proj.weight"], model.blocks[0].attention.qkv.weight[16:24])
    assert tensors["model.layers.0.self_attn.v_proj.bias"].shape == (8,)
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_layers_with_the_same_rope_share_its_tables(config):
    model = native.build(read(config, "config.json"))
    assert model.blocks[0].attention.rotary is model.blocks[1].attention.rotary


def test_saved_and_loaded_models_give_the_same_states(config, tmp_path):
    spec = read(config | {"tie_word_embeddings": True}, "config.json")
    model = native.build(spec)
    native.save(model, spec, tmp_path, config=config)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(native.load(tmp_path, spec)(ids), model(ids))
