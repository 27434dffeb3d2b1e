"""A decoder whose weights come in parts is the one that is read at once."""

import pytest
import torch
from safetensors.torch import load_file

from stoker.adapters.lora import Awaited, add_lora
from stoker.arch.families import read
from stoker.compose.vocabulary import grow
from stoker.models import native
from stoker.models.streamed import StreamedDecoder
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear

MIXTURE = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}


def gather_parts(decoder, streamed, num_ranks):
    """Fills the decoder `num_ranks` times, each time a part of every tensor, and returns its tensors put together."""
    parts = {}

    def holder(rank):
        def hold(module, name):
            tensor = getattr(module, name)
            rows = -(-tensor.shape[0] // num_ranks)
            first = min(rows * rank, tensor.shape[0])
            memory = torch.empty_like(tensor[first : first + rows], device="cpu")
            parts.setdefault((id(module), name), []).append(memory)
            return memory, first

        return hold

    for rank in range(num_ranks):
        streamed.fill(holder(rank))
    owners = {id(module): path for path, module in decoder.named_modules()}
    return {f"{owners[owner]}.{name}": torch.cat(rows) for (owner, name), rows in parts.items()}


def whole(decoder):
    return dict(decoder.named_parameters()) | dict(decoder.named_buffers())


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_parts_put_together_are_the_weights_read_at_once(sharded, config, kind, num_ranks):
    spec = read(config, "config.json")
    options = {"quantization": kind, "dtype": torch.bfloat16}
    streamed = StreamedDecoder(sharded, spec, **options)
    assert all(tensor.is_meta for tensor in whole(streamed.decoder).values())
    found = gather_parts(streamed.decoder, streamed, num_ranks)
    expected = whole(native.load(sharded, spec, **options))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("num_ranks", [1, 3, 40])
def test_rows_of_new_tokens_start_as_the_mean_of_the_others(sharded, config, num_ranks):
    spec, options = read(config, "config.json"), {"dtype": torch.bfloat16}
    streamed, loaded = StreamedDecoder(sharded, spec, **options), native.load(sharded, spec, **options)
    for decoder in (streamed.decoder, loaded):
        grow(decoder, spec.vocab_size + 5)
    found, expected = gather_parts(streamed.decoder, streamed, num_ranks), whole(loaded)
    assert found.keys() == expected.keys()
    assert found["embedding.weight"].shape[0] == spec.vocab_size + 5
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_memory_is_taken_for_one_weight_at_a_time_where_each_is_taken_away(sharded, config):
    spec = read(config, "config.json")
    streamed = StreamedDecoder(sharded, spec, quantization="nf4")
    waiting, taken = [], {}

    def hold(module, name):
        memory = torch.empty_like(getattr(module, name), device="cpu")
        waiting.append(((id(module), name), memory))
        return memory, 0

    def filled():
        assert len({module for (module, _), _ in waiting}) == 1
        taken.update((key, memory.clone()) for key, memory in waiting)
        waiting.clear()

    owners = {id(module): path for path, module in streamed.decoder.named_modules()}
    streamed.fill(hold, filled)
    expected = whole(native.load(sharded, spec, quantization="nf4"))
    found = {f"{owners[owner]}.{name}": tensor for (owner, name), tensor in taken.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_experts_come_one_by_one(tmp_path, kind):
    spec = read(MIXTURE, "config.json")
    native.save(native.build(spec), spec, tmp_path, config=MIXTURE)
    streamed = StreamedDecoder(tmp_path, spec, quantization=kind)
    found = gather_parts(streamed.decoder, streamed, 3)
    expected = whole(native.load(tmp_path, spec, quantization=kind))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_layers_that_fp8_would_move_too_far_stay_dense_whichever_rank_looks(folder, config, change_tensors):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        tensors[name][0, 0] = float("nan")
        change_tensors(folder, {name: tensors[name]})
    spec = read(config, "config.json")
    expected = native.load(folder, spec, quantization="fp8", dtype=torch.bfloat16)
    heard = []

    def share(rank, others):
        return StreamedDecoder(
            folder,
            spec,
            quantization="fp8",
            rank=rank,
            world_size=2,
            gather=lambda mine: heard.append(mine) or [mine, *others],
        ).decoder

    share(0, [])
    second = share(1, heard[:1])
    assert heard == [{"blocks.0.attention.out.weight"}, {"blocks.1.feed_forward.down.weight"}]
    assert dense(second) == dense(expected)


def dense(decoder):
    return {path for path, module in decoder.blocks.named_modules() if type(module) is FusedLinear}


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_an_adapter_on_awaited_weights_starts_as_on_loaded_ones(folder, config, kind):
    spec = read(config, "config.json")
    settings = {"rank": 2, "alpha": 4, "dora": True, "seed": 5}
    loaded = native.load(folder, spec, quantization=kind)
    add_lora(loaded, **settings)
    streamed = StreamedDecoder(folder, spec, quantization=kind)
    add_lora(streamed.decoder, **settings, awaited=Awaited("cpu", streamed.weight_of))
    found = {name: one for name, one in streamed.decoder.named_parameters() if one.requires_grad}
    expected = {name: one for name, one in loaded.named_parameters() if one.requires_grad}
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=0)
    assert any(isinstance(module, FrozenLinear) for module in streamed.decoder.modules()) == (kind != "none")
