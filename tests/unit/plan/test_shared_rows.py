"""Rows that devices share in the plan: lengths, what passes between the devices, and the time that they wait for it."""

from dataclasses import replace

import pytest

from stoker.arch import families
from stoker.errors import PlanError
from stoker.plan import shared_rows, speed
from stoker.plan.candidates import Job, Machine
from stoker.plan.catalogue import shipped
from stoker.plan.hardware import Device, Hardware
from stoker.plan.links import Links
from stoker.plan.many import choose_over
from stoker.plan.spread import SINGLE, Spread, configured, share
from stoker.plan.survey import Request, survey

GIB = 2**30
H100 = shipped()["h100"]
MACHINE = Hardware(
    (
        Device("cuda", H100.name, 80 * GIB, bf16=True, compute_capability=(9, 0), triton=True),
        Device("cpu", "CPU", 512 * GIB),
    ),
    num_threads=8,
)


@pytest.fixture(scope="module")
def long_8b():
    """Llama 3.1 8B with its long context."""
    return families.read(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        "config.json",
    )


def planned(run, spec, *changes, size=1, devices=2):
    asked = run("data.sequence_length=65536", f"engine.context_parallel={size}", "train.batch_size=2", *changes)
    way = configured(Spread("ddp", devices, devices), asked)
    return asked, choose_over(share(asked, way), spec, MACHINE, num_processes=devices)


def test_each_device_has_its_part_of_a_rows_length_or_its_own_rows(run):
    asked = run("data.sequence_length=1001", "engine.context_parallel=4", "train.batch_size=6")
    mine = share(asked, Spread("ddp", 8, 8))
    assert (mine.train.batch_size, mine.data.sequence_length) == (3, 251)
    with pytest.raises(ValueError, match="context_parallel = 4 does not divide 6 devices"):
        share(asked, Spread("ddp", 6, 6))
    with pytest.raises(ValueError, match="does not divide one device"):
        share(asked, SINGLE)
    with pytest.raises(ValueError, match="batch_size = 6 cannot be dealt out to 4 groups of 4 devices"):
        share(asked, Spread("ddp", 16, 8))


# (2 H + 2 K) E T / n (n - 1) / n values a direction and layer: docs/many_gpus.md has the same figures.
@pytest.mark.parametrize(("size", "megabytes"), [(2, 671.1), (8, 293.6)])
def test_an_exchange_sends_what_its_formula_says(long_8b, size, megabytes):
    keep = ("all",) * 32
    values = shared_rows.sent_values(long_8b, keep, size, is_fused=True)
    sent = 131_072 / size * values * 2 * (size - 1) / size
    assert sent / 32 / 2 / 1e6 == pytest.approx(megabytes, rel=1e-3)


def test_few_heads_are_repeated_and_what_is_run_again_is_sent_again(long_8b):
    def sent(rung, size):
        return shared_rows.sent_values(long_8b, (rung,) * 32, size, is_fused=True) / 32

    queries = 32 * 128
    assert sent("all", 8) == 2 * (2 * queries + 2 * 8 * 128)
    assert sent("all", 16) == 2 * (2 * queries + 2 * 16 * 128)
    assert sent("mixer", 8) == sent("all", 8)
    assert sent("attention", 8) == sent("all", 8) + queries + 2 * 8 * 128
    assert sent("input", 8) == 1.5 * sent("all", 8)


def test_devices_of_a_node_add_up_on_its_network():
    links = Links.of(replace(H100, network=50e9))
    inside = links.exchange_seconds(8e9, Spread("ddp", 8, 8, sharing=8), exchanges=4)
    assert inside == pytest.approx(8e9 * 7 / 8 / links.device + 4 * 25e-6)
    across = links.exchange_seconds(8e9, Spread("ddp", 16, 8, sharing=16), exchanges=0)
    assert across == pytest.approx(8 * 8e9 / 2 / links.network)
    assert links.exchange_seconds(8e9, Spread("ddp", 16, 8), exchanges=4) == 0.0


def test_a_part_takes_part_of_the_memory_and_all_of_its_share_of_the_work(run, long_8b):
    asked, parts = planned(run, long_8b, size=2)
    _, whole = planned(run, long_8b)
    assert (parts.sharing, parts.row_tokens, whole.row_tokens) == (2, 32768, 65536)
    way, machine = parts.spread, Machine(MACHINE.devices[0], 0, "bf16", uses_triton=True)
    of_both = [Job(asked, long_8b, machine, 32768, spread=way), Job(asked, long_8b, machine, 65536)]
    assert of_both[0].flops == of_both[1].flops
    same = replace(whole, sharing=2, row_tokens=32768, micro_batch_size=1, accumulation_steps=2)
    of_part = speed.step(asked, long_8b, same, H100, rows=speed.Rows(32768, 65536))
    of_whole = speed.step(
        asked, long_8b, replace(whole, micro_batch_size=1, accumulation_steps=1), H100, rows=speed.Rows(65536, 65536)
    )
    # Two parts of rows instead of one whole row: the same attention, and the same products.
    assert of_part.attention == pytest.approx(of_whole.attention)
    assert of_part.matmul == pytest.approx(of_whole.matmul)
    exchanged = 2 * Links.of(H100).exchange_seconds(
        32768 * shared_rows.sent_values(long_8b, same.keep, 2, is_fused=True) * 2, same.spread, exchanges=128
    )
    assert of_part.communication - of_whole.communication == pytest.approx(exchanged, rel=0.02)


def test_rows_that_fit_on_no_device_fit_on_several_that_share_them(run, long_8b):
    changes = (
        "data.sequence_length=131072",
        "train.batch_size=8",
        "engine.recompute=none",
        "engine.micro_batch_size=1",
    )
    with pytest.raises(PlanError, match="the run needs"):
        planned(run, long_8b, *changes, devices=8, size=1)
    _, plan = planned(run, long_8b, *changes, devices=8, size=8)
    assert plan.memory.total <= plan.available_bytes
    assert plan.memory.communication > 512 * 2**20


def test_the_survey_counts_groups_of_devices(run, long_8b):
    asked = run("data.sequence_length=32768", "engine.context_parallel=2", "train.batch_size=4", "train.steps=10")
    offers = survey(Request(asked, long_8b, None, ("lora",), nodes=1, per_node=8), [H100], every_strategy=True)
    by_way = {(one.num_devices, one.spread.name): one for one in offers}
    assert "does not divide one device" in by_way[1, "single"].why_not
    assert "shared under ddp and fsdp2" in by_way[8, "ZeRO-3"].why_not
    four = by_way[4, "ddp"]
    assert four.fits
    # Two groups with two of the four rows each.
    assert four.config.train.batch_size == 2
    assert four.tokens_per_second == pytest.approx(4 * 32768 / four.step.seconds)
