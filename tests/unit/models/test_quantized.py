import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stoker.arch.families import read
from stoker.errors import ModelError
from stoker.models import native, weight_names
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.quant import nf4
from stoker.quant.formats import FORMATS, quantize

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(folder, config, **options):
    return native.load(folder, read(config, "config.json"), **options)


def linears(decoder):
    return [module for module in decoder.blocks.modules() if isinstance(module, FusedLinear)]


@pytest.fixture
def packed(folder, tmp_path):
    """The folder as bitsandbytes would store it in NF4; `stored_in_full`: endings of weights that it leaves alone."""

    def make(*stored_in_full):
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS))]:
            if not name.endswith(stored_in_full or ("nothing",)):
                weight = nf4.NF4Weight.quantize(tensors.pop(name))
                tensors |= nf4.to_checkpoint(weight, (name.removesuffix(".weight"),))
        (tmp_path / "packed").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "packed" / "model.safetensors")
        return tmp_path / "packed"

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_linear_layers_of_the_blocks_are_quantized_and_nothing_else(folder, sharded, config, kind):
    plain = load(folder, config)
    for path in (folder, sharded):
        decoder = load(path, config, quantization=kind, dtype=torch.bfloat16)
        assert all(isinstance(layer, FrozenLinear) for layer in linears(decoder))
        assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
        assert decoder.head_weight.shape == (40, 16)
        for layer, original in zip(linears(decoder), linears(plain), strict=True):
            assert layer.names == original.names
            # Quantised from what the folder holds, fp32, not from a bf16 copy.
            expected = quantize(original.weight, kind, part_rows=original.out_features)
            for name, buffer in layer.matrix.named_buffers():
                assert torch.equal(buffer, expected.get_buffer(name)), name


def test_all_weights_share_one_buffer_of_the_largest(folder, config):
    decoder = load(folder, config, quantization="nf4")
    (scratch,) = {id(layer.matrix.scratch): layer.matrix.scratch for layer in linears(decoder)}.values()
    decoder(torch.tensor([[1, 2, 3]]))
    assert scratch.num_bytes == 2 * 24 * 16 * 4  # gate and up in fp32


def test_memory_holds_one_weight_beside_the_quantized_model(folder, config, monkeypatch):
    sizes = []
    to_empty = torch.nn.Module.to_empty

    def measured(module, **options):
        made = to_empty(module, **options)
        sizes.append(sum(parameter.numel() for parameter in made.parameters()))
        return made

    monkeypatch.setattr(torch.nn.Module, "to_empty", measured)
    load(folder, config, quantization="nf4")
    load(folder, config)
    in_full = 2 * (16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 24)
    assert sizes[1] - sizes[0] == in_full  # what is to be quantised never gets memory in full


def test_a_folder_of_bitsandbytes_is_read_as_it_is(folder, packed, config):
    ours, theirs = load(folder, config, quantization="nf4"), load(packed(), config, quantization="nf4")
    for ours_layer, their_layer in zip(linears(ours), linears(theirs), strict=True):
        for name, buffer in ours_layer.matrix.named_buffers():
            assert torch.equal(buffer, their_layer.matrix.get_buffer(name)), name
    in_full = load(packed(), config)
    assert not any(isinstance(layer, FrozenLinear) for layer in linears(in_full))
    for layer, expected in zip(linears(in_full), linears(ours), strict=True):
        assert torch.equal(layer.weight, expected.weight)


def test_what_such_a_folder_stores_in_full_stays_so(folder, packed, config):
    decoder = load(packed("1.mlp.down_proj.weight", "0.self_attn.v_proj.weight"), config, quantization="nf4")
    plain, quantized = load(folder, config), load(folder, config, quantization="nf4")
    down = decoder.blocks[1].feed_forward.down
    assert not isinstance(down, FrozenLinear)
    assert torch.equal(down.weight, plain.blocks[1].feed_forward.down.weight)
    # q and k are packed, v is not: together they are one matrix in full, each part with its own values.
    qkv, rows = decoder.blocks[0].attention.qkv, slice(24, 32)
    assert not isinstance(qkv, FrozenLinear)
    assert torch.equal(qkv.weight[rows], plain.blocks[0].attention.qkv.weight[rows])
    assert torch.equal(qkv.weight[:24], quantized.blocks[0].attention.qkv.weight[:24])
    assert isinstance(decoder.blocks[0].feed_forward.down, FrozenLinear)


def test_shapes_of_packed_weights_are_checked(packed, config):
    with pytest.raises(ModelError, match=r"q_proj\.weight has shape \[16, 16\], but config\.json makes it \[16, 32\]"):
        load(packed(), config | {"hidden_size": 32, "head_dim": 4}, quantization="nf4")


def test_a_damaged_state_is_named(packed, config, change_tensors):
    folder = packed()
    broken = torch.tensor(list(json.dumps({"shape": "wide"}).encode()), dtype=torch.uint8)
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(folder, {f"{name}.{nf4.STATE_KEY}": broken})
    with pytest.raises(ModelError, match=f"state of {name} cannot be read"):
        load(folder, config, quantization="nf4")


def test_tensors_of_a_quantized_model_are_its_values(folder, config):
    spec = read(config, "config.json")
    decoder = load(folder, config, quantization="int8")
    tensors = dict(native.hf_tensors(decoder, spec))
    assert tensors.keys() == load_file(folder / "model.safetensors").keys()
    down = decoder.blocks[1].feed_forward.down.weight
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], down)


def not_in_fp8(decoder):
    return [layer.names[0] for layer in linears(decoder) if not isinstance(layer, FrozenLinear)]


@pytest.fixture
def sensitive(folder, change_tensors):
    """The folder with a norm whose first channel is a million times larger, and layers that never read it but one."""
    tensors = load_file(folder / "model.safetensors")
    norm, layer = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn"
    scale = torch.ones(16)
    scale[0] = 1e6
    changes = {norm: scale}
    for name in ("q_proj", "k_proj"):
        weight = tensors[f"{layer}.{name}.weight"].clone()
        weight[:, 0] = 0.0 if name == "k_proj" else weight[:, 0]
        changes[f"{layer}.{name}.weight"] = weight
    change_tensors(folder, changes)
    return folder


def test_a_layer_that_fp8_would_move_too_far_stays_in_the_compute_type(sensitive, config):
    # k does not read the huge channel; in fp8 the row's one scale lets all that k reads underflow.
    decoder = load(sensitive, config, quantization="fp8", dtype=torch.bfloat16)
    assert not_in_fp8(decoder) == ["model.layers.1.self_attn.q_proj"]
    kept = decoder.blocks[1].attention.qkv.weight
    assert (kept.dtype, kept.requires_grad) == (torch.bfloat16, False)
    assert torch.equal(kept, load(sensitive, config, dtype=torch.bfloat16).blocks[1].attention.qkv.weight)
    decoder(torch.tensor([[1, 2, 3]]))  # both kinds of layers compute


def test_layers_of_other_formats_are_not_kept_back(sensitive, config):
    for kind in ("nf4", "int8"):
        assert not not_in_fp8(load(sensitive, config, quantization=kind))


def test_a_weight_that_is_not_finite_is_not_put_in_fp8(folder, config, change_tensors):
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(folder / "model.safetensors")[name].clone()
    weight[0, 0] = float("nan")
    change_tensors(folder, {name: weight})
    assert not_in_fp8(load(folder, config, quantization="fp8")) == ["model.layers.0.mlp.down_proj"]


def test_names_alone_tell_packed_weights():
    assert f".{nf4.STATE_KEY}" == weight_names.PACKED
