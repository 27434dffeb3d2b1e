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
        # And but for the start anew on the device, with q, k and v made again instead of waiting on the host.
        if upper.keep[-1] == lower.keep[-1] and upper.offload <= lower.offload and "input" not in lower.keep:
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
    assert [step.num_away for step in _ladders(asked="mixer")] == [0, 1, 2, 3]
    assert [step.num_away for step in _ladders(asked="none", offload=True)] == [3]
    assert _ladders(asked="none", fuses_all=False) == [Ladder(("all",) * 3, False, "op by op")]


def test_what_layers_keep_waits_on_the_host_one_layer_after_the_other():
    steps = _ladders()
    assert [(step.keep, step.num_away) for step in steps[3:7]] == [(("mixer",) * 3, count) for count in range(4)]
    assert [(step.keep[0], step.num_away) for step in steps[7:10]] == [("attention", 0)] * 3
    assert [(step.keep[0], step.num_away) for step in steps[10:]] == [("attention", 3)] * 3 + [("input", 3)] * 3


@pytest.mark.parametrize(("count", "num_away"), [(1, 1), (2, 2), (3, 3), (7, 3), (True, 3), (False, 0)])
def test_so_many_layers_have_theirs_wait_as_are_asked_for(count, num_away):
    assert [step.num_away for step in _ladders(asked="mixer", offload=count)] == [num_away]
    assert {step.num_away for step in _ladders(offload=count)} == {num_away}


def test_each_layer_more_on_the_host_spares_what_it_keeps(llama_8b):
    micro, keep = Micro(8192, 2), ("mixer",) * 32
    one = (4096 + 6144 + 4096) * 2 * 8192 + 4 * 32 * 8192  # x, q with k and v, attention's output and its statistics
    assert Ladder(keep, True, "fused", staying=0).host_bytes(llama_8b, micro) == 32 * one
    away = [Ladder(keep, True, "fused", staying=staying) for staying in range(33)]
    assert [ladder.host_bytes(llama_8b, micro) for ladder in away] == [one * count for count in range(32, -1, -1)]
    forward = [ladder.bytes_after_forward(llama_8b, micro) for ladder in away]
    # Where some stay all others have left by then, and not only those before the last four tensors.
    assert forward[1] == forward[0] + one - 4 * 4096 * 2 * 8192
    assert [upper - lower for upper, lower in itertools.pairwise(reversed(forward[1:]))] == [one] * 31
    peaks = [ladder.device_bytes(llama_8b, micro) for ladder in away]
    assert peaks == sorted(peaks)
    assert away[32].device_bytes(llama_8b, micro) == Ladder(keep, False, "fused").device_bytes(llama_8b, micro)


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
