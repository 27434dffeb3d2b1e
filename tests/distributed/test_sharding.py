"""How fsdp2 shares weights: streamed into parts, under every setting, in every number format."""

import os
from contextlib import suppress
from functools import cache

import jobs
import pytest
import torch
from torch.distributed.tensor import DTensor

from stoker.adapters.fused_block import FusedBlock, fuse_blocks
from stoker.adapters.lora import Awaited, add_lora
from stoker.arch import families
from stoker.distributed.ddp import DataParallel
from stoker.distributed.fsdp2 import Sharded, Sharding
from stoker.distributed.single import SingleDevice
from stoker.kernels.adamw import AdamWStep, adamw_
from stoker.models import native
from stoker.models.streamed import StreamedDecoder
from stoker.optim.stochastic import StochasticAdamW
from stoker.tasks.supervised import SupervisedTask

ALL = os.environ.get("STOKER_TEST_ALL") == "1"
STEPS = 3
SPEC = families.read({**jobs.CASES["full"].config.to_dict(), "architectures": None}, "config.json")
KINDS = ("none", "nf4", "int8")
SETTINGS = {
    "kept": Sharding(reshard_after_forward=False),
    "offload": Sharding(cpu_offload=True),
    "gathered in bf16": Sharding(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
}


def save(folder):
    native.save(
        native.build(SPEC, seed=0, initializer_range=0.1), SPEC, folder, config=jobs.CASES["full"].config.to_dict()
    )


def lora(model, awaited=None):
    """Adapters with a B that is not zero, and layers through the layer kernel."""
    add_lora(model, rank=4, alpha=8, awaited=awaited)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.fill_(0.05)
    fuse_blocks(model, keep="mixer", implementation="reference")
    return model


def streamed(ranks, folder, kind):
    """Trains adapters on a base of which this rank reads its part alone; returns what it held, in bytes, as well."""
    loaded = StreamedDecoder(
        folder, SPEC, quantization=kind, rank=ranks.rank, world_size=ranks.world_size, gather=ranks.gather
    )
    model = lora(loaded.decoder, Awaited("cpu", loaded.weight_of))
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), fill=loaded.fill)
    result = jobs.train("lora", "fsdp2", model=model, strategy=strategy, steps=STEPS)
    held = [
        (parameter.to_local().nbytes, parameter.numel() * parameter.element_size())
        for parameter in model.parameters()
        if isinstance(parameter, DTensor)
    ]
    fused = all(isinstance(block, FusedBlock) for block in model.blocks)
    return result["losses"], [sum(column) for column in zip(*held, strict=True)], fused


def with_settings(ranks, sharding):
    model = jobs.build(jobs.CASES["full"])
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), sharding=sharding)
    result = jobs.train("full", "fsdp2", model=model, strategy=strategy, steps=STEPS)
    return result["losses"], result["norms"]


def narrow(strategy_of):
    """Trains every weight in bf16; returns the losses and each rank's own weights as bytes."""
    model = jobs.build(jobs.CASES["full"]).to(torch.bfloat16)
    strategy = strategy_of(model)

    def update(weight, grad, average, square, *, number, betas, **values):
        numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
        adamw_(weight, grad, average, square, numbers, seed=1, number=number + (strategy.part << 20))

    def optimizer(named):
        group = {"params": [parameter for _, parameter in named]}
        return StochasticAdamW([group], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, update=update)

    result = jobs.train("full", "", model=model, strategy=strategy, optimizer=optimizer, precision="bf16", steps=STEPS)
    held = [one.to_local() if isinstance(one, DTensor) else one for one in model.parameters()]
    return result["losses"], [one.detach().float().sum().item() for one in held]


def overflow(ranks):
    """One rank's gradients overflow; returns each rank's word on the step and its loss scale before and after."""
    model = jobs.build(jobs.CASES["full"])
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), precision="fp16")
    strategy.prepare(SupervisedTask(model), jobs.adamw)
    before = strategy._scaler.get_scale()
    (batch, *_) = jobs.loader(jobs.CASES["full"], strategy).step(0)
    strategy.forward_backward(batch, divisor=10.0, is_last=True)
    weight = model.blocks[0].attention.out.weight
    if ranks.rank == 1:
        weight.grad.to_local()[0, 0] = float("inf")
    result = strategy.step(1e-2, max_gradient_norm=1.0)
    return ranks.gather((result.skipped, before, result.loss_scale))


def everything(ranks, folder):
    found = {kind: streamed(ranks, folder, kind) for kind in KINDS}
    found |= {name: with_settings(ranks, sharding) for name, sharding in SETTINGS.items()}
    found["overflow"] = overflow(ranks)
    losses, sums = narrow(lambda model: DataParallel(ranks, "cpu", precision="bf16"))
    found["bf16 ddp"] = losses, ranks.gather(sums)
    found["bf16"] = narrow(
        lambda model: Sharded(ranks, "cpu", model=model, layers=list(model.blocks), precision="bf16")
    )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(path)
    return path


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    return jobs.on_ranks(2, tmp_path_factory.mktemp("ranks"), everything, folder)


@cache
def plain():
    result = jobs.train("full", "single", steps=STEPS)
    return result["losses"], result["norms"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_streamed_into_parts_trains_as_one_that_one_device_reads(found, folder, kind):
    losses, (held, whole), is_fused = found[kind]
    model = lora(native.load(folder, SPEC, quantization=kind))
    assert losses == pytest.approx(jobs.train("lora", "single", model=model, steps=STEPS)["losses"], abs=5e-6)
    assert is_fused  # through the layer kernel, on gathered parts
    assert held <= 0.52 * whole  # half, and a row more where rows are odd


@pytest.mark.parametrize("name", ["kept", "offload"])
def test_where_and_when_weights_are_gathered_does_not_change_the_result(found, name):
    losses, norms = found[name]
    assert losses == pytest.approx(plain()[0], abs=5e-6)
    assert norms == pytest.approx(plain()[1], rel=1e-4)


def test_gathering_in_bf16_rounds_and_no_more(found):
    losses, _ = found["gathered in bf16"]
    assert losses != pytest.approx(plain()[0], abs=5e-6)
    assert losses == pytest.approx(plain()[0], abs=0.02)


def test_an_overflow_on_one_rank_lowers_every_ranks_loss_scale(found):
    assert found["overflow"] == [(True, 65536.0, 32768.0)] * 2


def test_bf16_weights_round_alike_where_ranks_hold_the_same_and_go_on_where_they_share(found):
    alone, _ = narrow(lambda model: SingleDevice("cpu", precision="bf16"))
    losses, (first, second) = found["bf16 ddp"]
    assert first == second
    assert losses == pytest.approx(alone, abs=0.02)
    assert found["bf16"][0] == pytest.approx(alone, abs=0.02)
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
