"""fsdp2 where no weight is split, on one process or on groups of one: frozen weights stay as they are, and whole."""

from dataclasses import replace

import jobs
import pytest
import torch
from sharding_jobs import KINDS, SPEC, STEPS, go_on, lora, narrow, save
from torch.distributed.tensor import DTensor

from stoker.adapters.lora import Awaited
from stoker.distributed.fsdp2 import Sharded, Sharding
from stoker.distributed.single import SingleDevice
from stoker.models import native
from stoker.models.streamed import StreamedDecoder

NAMES = ("full", "lora", "nf4", "opt", "gptj", "8-bit", "adafactor", "muon")
SETTINGS = {
    "kept": Sharding(reshard_after_forward=False),
    "summed in bf16": Sharding(reduce_dtype=torch.bfloat16),
    "offload": Sharding(cpu_offload=True),
}
RESUMED = ("full", "nf4", "8-bit")


def sharded(ranks, model, **options):
    return Sharded(ranks, "cpu", model=model, layers=list(model.blocks), **options)


def places(model):
    """Where each tensor of a model lies, parameters that are trained left out."""
    frozen = {name: one for name, one in model.named_parameters() if not one.requires_grad}
    return {name: one.data_ptr() for name, one in [*frozen.items(), *model.named_buffers()]}


def with_settings(ranks, name, sharding=None):
    """Trains a case; returns what that gives, whether all that is frozen is where it was, and what is shared."""
    model = jobs.build(jobs.CASES[name])
    before = places(model)
    strategy = sharded(ranks, model, sharding=sharding)
    result = jobs.train(name, "", model=model, strategy=strategy)
    shared = {key: one.requires_grad for key, one in model.named_parameters() if isinstance(one, DTensor)}
    trained = {key for key, one in model.named_parameters() if one.requires_grad}
    stepped = {isinstance(one, DTensor) for group in strategy._optimizer.param_groups for one in group["params"]}
    return {**result, "stayed": places(model) == before, "shared": shared, "trained": trained, "in parts": stepped}


def streamed(ranks, folder, kind):
    """The losses of adapters on a base that is read into the memory where it stays, and its tensors' devices."""
    loaded = StreamedDecoder(folder, SPEC, quantization=kind)
    model = lora(loaded.decoder, Awaited("cpu", loaded.weight_of))
    strategy = sharded(ranks, model, fill=loaded.fill)
    losses = jobs.train("lora", "", model=model, strategy=strategy, steps=STEPS)["losses"]
    tensors = [*model.parameters(), *model.buffers()]
    return losses, {one.device.type for one in tensors}


def half_frozen(strategy_of):
    """The losses of bf16 weights with fp32 norms, of which the embedding and the first layer are frozen."""
    model = native.build(replace(SPEC, head_bias=True), seed=0, initializer_range=0.1)
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return narrow(strategy_of, "full", model=model)[0]


def on_one(ranks, folder):
    found = {name: with_settings(ranks, name) for name in NAMES}
    found |= {kind: with_settings(ranks, "nf4", sharding) for kind, sharding in SETTINGS.items()}
    found["streamed"] = {kind: streamed(ranks, folder / "model", kind) for kind in KINDS}
    found["half frozen"] = half_frozen(lambda model: sharded(ranks, model, precision="bf16"))
    found["resumed"] = {name: [go_on(ranks, "fsdp2", name, folder / name)[0] for _ in range(2)] for name in RESUMED}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("one")
    save(place / "model")
    return place


@pytest.fixture(scope="module")
def one(folder):
    return jobs.on_ranks(1, folder, on_one, folder)


def check_as_one_device(found, name):
    expected, grain = jobs.alone(name), jobs.CASES[name].grain
    assert found["losses"] == pytest.approx(expected["losses"], abs=grain)
    assert found["norms"] == pytest.approx(expected["norms"], rel=max(1e-4, 2 * grain))
    assert found["loss"] == pytest.approx(expected["loss"], abs=grain)
    for key, weight in expected["state"].weights.items():
        torch.testing.assert_close(found["state"].weights[key], weight, atol=max(2e-4, 10 * grain), rtol=1e-3)
        torch.testing.assert_close(found["whole"][key], found["state"].weights[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_trained_weights_alone_are_shared_and_all_trains_as_on_one_device(one, name):
    found = one[name]
    assert found["stayed"]
    assert set(found["shared"]) == found["trained"]
    assert found["in parts"] == {False}  # what the optimiser steps
    check_as_one_device(found, name)


def test_what_waits_on_the_host_is_shared_frozen_or_not(one):
    assert set(one["offload"]["shared"].values()) == {True, False}
    assert one["offload"]["in parts"] == {True}
    check_as_one_device(one["offload"], "nf4")


def test_layers_that_stay_gathered_train_the_same(one):
    assert one["kept"]["stayed"]
    check_as_one_device(one["kept"], "nf4")


def test_gradients_in_bf16_round_and_no_more(one):
    found, expected = one["summed in bf16"]["losses"], jobs.alone("nf4")["losses"]
    assert found != pytest.approx(expected, abs=1e-6)
    assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_streamed_to_where_it_stays(one, folder, kind):
    losses, devices = one["streamed"][kind]
    model = lora(native.load(folder / "model", SPEC, quantization=kind))
    assert losses == pytest.approx(jobs.train("lora", "single", model=model, steps=STEPS)["losses"], abs=5e-6)
    assert devices == {"cpu"}  # none was left without memory


def test_frozen_tables_and_layers_stay_beside_trained_ones_of_two_dtypes(one):
    assert one["half frozen"] == pytest.approx(
        half_frozen(lambda model: SingleDevice("cpu", precision="bf16")), abs=0.02
    )


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_from_its_checkpoint_and_then_on_one_device(one, folder, name):
    first, second = one["resumed"][name]
    third = go_on(None, "single", name, folder / name)[0]
    assert [*first, *second, *third] == pytest.approx(
        jobs.alone(name, 3 * STEPS)["losses"], abs=max(1e-5, jobs.CASES[name].grain)
    )


def in_groups_of_one(ranks):
    return {name: with_settings(ranks, name, Sharding(replicas=2)) for name in ("lora", "nf4")}


def test_groups_of_one_keep_frozen_weights_whole_and_average_gradients(tmp_path):
    for name, found in jobs.on_ranks(2, tmp_path, in_groups_of_one).items():
        assert found["stayed"]
        assert set(found["shared"]) == found["trained"]
        check_as_one_device(found, name)
