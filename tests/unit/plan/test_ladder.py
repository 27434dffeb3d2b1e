import itertools
from dataclasses import replace

import pytest

from stoker.arch import families
from stoker.arch.activations import LADDER, Micro
from stoker.plan.ladder import TILE_TOKENS, Ladder, ladders, words

SIZES = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
LLAMA = families.read({**SIZES, "num_hidden_layers": 1}, "config.json").layers[0]
# A layer as Gemma 2 has it, which the layer kernel cannot run.
GEMMA = replace(LLAMA, placement="sandwich")


def _ladders(*, layers=(LLAMA,) * 3, **changes):
    settings = {"asked": "auto", "offload": "auto", "can_fuse": True, "can_offload": True, "fuses_all": True}
    return list(ladders(layers, **(settings | changes)))


@pytest.mark.parametrize("changes", [{}, {"offload": False}, {"offload": True}, {"can_fuse": False}])
def test_no_step_down_takes_more_memory(llama_8b, changes):
    settings = {"asked": "auto", "offload": "auto", "can_fuse": True, "can_offload": True, "fuses_all": True}
    steps = list(ladders(llama_8b.layers, **(settings | changes)))
    for upper, lower in itertools.pairwise(steps):
        # But for the last layer's: its backward comes first, when all that the others keep is still there.
        # And but for attention made again where its result waited on the host: that spares the host's memory.
        if upper.keep[-1] == lower.keep[-1] and not (lower.offload and "input" in lower.keep):
            assert lower.device_bytes(llama_8b, Micro(8192, 2)) <= upper.device_bytes(llama_8b, Micro(8192, 2))
    assert steps[-1].device_bytes(llama_8b, Micro(8192, 2)) < steps[0].device_bytes(llama_8b, Micro(8192, 2)) / 4
    assert len(set(steps)) == len(steps)


def test_the_ladder_goes_down_one_layer_at_a_time():
    steps = _ladders(offload=False)
    assert [step.keep.count("all") for step in steps[:4]] == [3, 2, 1, 0]
    assert [step.keep[0] for step in steps[::3]] == list(LADDER)
    assert not any(step.offload for step in steps)


def test_a_rung_that_is_set_is_the_only_one():
    assert [step.keep for step in _ladders(asked="mixer", offload=False)] == [("mixer",) * 3]
    assert [step.offload for step in _ladders(asked="mixer")] == [False, True]
    assert [step.offload for step in _ladders(asked="none", offload=True)] == [True]
    assert _ladders(asked="none", fuses_all=False) == [Ladder(("all",) * 3, False, "op by op")]


def test_without_the_layer_kernel_there_are_two_rungs():
    steps = _ladders(can_fuse=False)
    assert {step.layers for step in steps} == {"op by op"}
    assert [step.keep.count("input") for step in steps] == [0, 1, 2, 3]


def test_layers_that_the_layer_kernel_cannot_run_have_two_rungs_among_those_that_it_can():
    steps = _ladders(layers=(LLAMA, GEMMA), offload=False)
    assert [step.keep for step in steps] == [
        ("all", "all"),
        ("mixer", "all"),
        ("mixer", "input"),
        ("attention", "input"),
        ("input", "input"),
    ]
    assert _ladders(layers=(LLAMA, GEMMA), asked="mixer", offload=False)[0].keep == ("mixer", "input")


def test_no_gpu_no_offload():
    assert not any(step.offload for step in _ladders(can_offload=False))


@pytest.mark.parametrize("offload", [False, True])
def test_tiles_are_taken_where_they_lower_the_peak(llama_8b, offload):
    long, short = Micro(4 * TILE_TOKENS, 2), Micro(TILE_TOKENS, 2)
    for rung in LADDER:
        ladder = Ladder((rung,) * 32, offload, "fused")
        tiled = ladder.tiled(llama_8b, long)
        assert tiled.tile_tokens == (None if rung == "all" else TILE_TOKENS)
        if tiled.tile_tokens:
            assert tiled.device_bytes(llama_8b, long) < ladder.device_bytes(llama_8b, long)
            assert tiled.host_bytes(llama_8b, long) == ladder.host_bytes(llama_8b, long)
            assert tiled.tiled(llama_8b, short) == ladder  # one tile would be all of it


def test_tiles_are_not_taken_where_the_peak_is_elsewhere(llama_8b):
    long = Micro(4 * TILE_TOKENS, 2)
    # The last layer keeps all, and its backward comes while the others' memory is still held.
    mixed = Ladder(("mixer",) * 2 + ("all",) * 30, False, "fused")
    assert mixed.tiled(llama_8b, long) == mixed
    # Autograd's own layers know no tiles.
    op_by_op = Ladder(("input",) * 32, False, "op by op")
    assert op_by_op.tiled(llama_8b, long) == op_by_op
    # Two tiles barely: a second pass over the weights for next to nothing.
    barely = Micro(TILE_TOKENS + 64, 2)
    assert Ladder(("mixer",) * 32, False, "fused").tiled(llama_8b, barely).tile_tokens is None


def test_words():
    assert words(["all"] * 4) == "keep all"
    assert words(["mixer"] * 2 + ["all"] * 30) == "keep all in 30 layers, mixer in 2"
    assert words(["input", "attention"]) == "keep attention in 1 layer, input in 1"
