import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stoker.arch import arithmetic, families
from stoker.compose.bench import shapes
from stoker.compose.model import load_decoder, load_tokenizer, open_base
from stoker.errors import ModelError


def test_transformers_and_stoker_load_the_same_model(folder, base):
    ours = load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(12)[None] * 7
    with torch.no_grad():
        difference = (ours.logits(ours(ids)) - theirs(input_ids=ids).logits).abs().max()
    assert difference < 1e-5  # fp32 sums in another order
    assert ours.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_it_has_a_tokenizer_of_bytes(folder, base):
    assert AutoTokenizer.from_pretrained(folder).decode(load_tokenizer(base)("any text: ü").input_ids) == "any text: ü"


def test_it_is_made_once_and_in_shards(folder, tmp_path):
    made = (folder / "config.json").stat().st_mtime_ns
    assert shapes.resolve("shape:llama-tiny", device="cpu", folder=folder.parent) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    shapes.write(shapes.SHAPES["llama-tiny"], tmp_path, device="cpu", max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, parts = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (folder, tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_shapes_have_the_published_sizes():
    counts = {name: arithmetic.num_parameters(families.read(config, name)) for name, config in shapes.SHAPES.items()}
    assert counts["llama-3.1-8b"] == 8_030_261_248
    assert counts["llama-3.2-1b"] == 1_235_814_400
    assert counts["mamba-130m"] == 129_135_360
    assert counts["mamba2-780m"] == 780_161_280
    # Of the mixtures, so many layers and embedding and head.
    whole = {
        name: families.read(shapes.SHAPES[name] | {"num_hidden_layers": count}, name)
        for name, count in {"qwen3-30b-a3b-8-layers": 48, "mixtral-8x7b-4-layers": 32}.items()
    }
    assert arithmetic.num_parameters(whole["qwen3-30b-a3b-8-layers"]) == 30_532_122_624
    assert arithmetic.num_parameters(whole["mixtral-8x7b-4-layers"]) == 46_702_792_704


def test_a_published_model_is_a_shape_and_so_are_its_first_layers():
    whole = arithmetic.num_parameters(families.read(shapes.config_of("llama-3.1-70b"), "whole"))
    assert whole == 70_553_706_496
    cut = shapes.config_of("llama-3.1-70b-2-layers")
    assert cut["num_hidden_layers"] == 2
    assert arithmetic.num_parameters(families.read(cut, "cut")) < whole / 15


def test_a_shape_stored_in_nf4_is_read_as_one(tmp_path):
    folder = shapes.resolve("shape:llama-tiny-nf4", device="cpu", folder=tmp_path)
    opened = open_base(str(folder))
    assert opened.stored_quantization == "nf4"
    model = load_decoder(opened, device="cpu", dtype=torch.float32, kernels="reference")
    qkv = model.blocks[0].attention.qkv.matrix
    assert qkv.dequantize(dtype=torch.float32).std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.final_norm.weight, torch.ones(64))
    assert model(torch.arange(8)[None]).std() > 0.1
    with pytest.raises(ModelError, match="mixtral are not made in NF4"):
        shapes.resolve("shape:mixtral-8x7b-4-layers-nf4", device="cpu", folder=tmp_path)


def test_an_unknown_shape_is_refused_with_those_that_exist():
    with pytest.raises(ModelError, match=r"There is no shape 'shape:gpt-5'.*shape:llama-3\.2-1b"):
        shapes.resolve("shape:gpt-5", device="cpu")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be written"):
        shapes.resolve("shape:llama-tiny", device="cpu", folder=tmp_path / "file")
