"""How fsdp2 shares weights: streamed into parts, under every setting, in every number format."""

import os
from contextlib import suppress
from functools import cache

import jobs
import pytest
from sharding_jobs import KINDS, SPEC, STEPS, lora, narrow, with_settings

from stoker.distributed.fsdp2 import Sharded, Sharding
from stoker.distributed.single import SingleDevice
from stoker.models import native

ALL = os.environ.get("STOKER_TEST_ALL") == "1"


@cache
def plain():
    result = jobs.train("full", "single", steps=STEPS)
    return result["losses"], result["norms"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_streamed_into_parts_trains_as_one_that_one_device_reads(shared, kind):
    losses, (held, whole), is_fused = shared[kind]
    model = lora(native.load(shared["folder"], SPEC, quantization=kind))
    assert losses == pytest.approx(jobs.train("lora", "single", model=model, steps=STEPS)["losses"], abs=5e-6)
    assert is_fused  # through the layer kernel, on gathered parts
    assert held <= 0.52 * whole  # half, and a row more where rows are odd


@pytest.mark.parametrize("name", ["kept", "offload"])
def test_where_and_when_weights_are_gathered_does_not_change_the_result(shared, name):
    losses, norms = shared[name]
    assert losses == pytest.approx(plain()[0], abs=5e-6)
    assert norms == pytest.approx(plain()[1], rel=1e-4)


def test_gathering_in_bf16_rounds_and_no_more(shared):
    losses, _ = shared["gathered in bf16"]
    assert losses != pytest.approx(plain()[0], abs=5e-6)
    assert losses == pytest.approx(plain()[0], abs=0.02)


def test_an_overflow_on_one_rank_lowers_every_ranks_loss_scale(shared):
    assert shared["overflow"] == [(True, 65536.0, 32768.0)] * 2


def test_bf16_weights_round_alike_where_ranks_hold_the_same_and_go_on_where_they_share(shared):
    alone, _ = narrow(lambda model: SingleDevice("cpu", precision="bf16"))
    losses, (first, second) = shared["bf16 ddp"]
    assert first == second
    assert losses == pytest.approx(alone, abs=0.02)
    assert shared["bf16"][0] == pytest.approx(alone, abs=0.02)
    assert alone[-1] < alone[0] - 0.05


def in_groups(ranks):
    return with_settings(ranks, Sharding(replicas=2))


@pytest.mark.skipif(not ALL, reason="make test-distributed runs it")
def test_groups_that_each_hold_the_model_train_as_one_device(tmp_path):
    losses, norms = jobs.on_ranks(4, tmp_path, in_groups)
    assert losses == pytest.approx(plain()[0], abs=5e-6)
    assert norms == pytest.approx(plain()[1], rel=1e-4)


def test_groups_must_be_equal():
    with suppress(ValueError):
        Sharded(type("Three", (), {"world_size": 3, "rank": 0})(), model=None, layers=(), sharding=Sharding(replicas=2))
        pytest.fail("three ranks were made two groups")
