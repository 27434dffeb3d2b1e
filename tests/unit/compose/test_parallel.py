"""What the plan of one process becomes beside others."""

from dataclasses import replace

import pytest

from stoker.arch import shapes
from stoker.compose import parallel
from stoker.config.load import parse
from stoker.errors import PlanError
from stoker.plan.hardware import Device, Hardware
from stoker.plan.many import choose_over

GIB = 2**30
GPU = Device("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, bf16=True, compute_capability=(9, 0), triton=True)
MACHINE = Hardware((GPU, Device("cpu", "CPU", 256 * GIB)), num_threads=8)
SPEC = shapes.spec("llama-3.1-8b")


def configured(*, adapter=True, **engine):
    values = {
        "model": {"base": "some/model"},
        "adapter": {"rank": 16} if adapter else None,
        "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 512, "packing": False},
        "train": {"learning_rate": 2e-4, "batch_size": 8},
        "engine": engine,
        "output": {"folder": "runs/x"},
    }
    return parse(values)


def planned(count, *, machine=MACHINE, **engine):
    config = configured(**engine)
    plan = choose_over(parallel.share_of_one(config, count), SPEC, machine, num_processes=count)
    return parallel.spread(plan, config, count)


def test_graphs_are_refused_over_processes_where_they_are_asked_for_and_left_out_where_not():
    assert planned(1, cuda_graphs=True).cuda_graphs
    with pytest.raises(PlanError, match=r"engine.cuda_graphs = true is for one process; the strategy is ddp. Use auto"):
        planned(2, cuda_graphs=True)
    plan = planned(2)
    assert not plan.cuda_graphs
    assert plan.reasons["cuda_graphs"] == "graphs are for one process"


def test_a_plan_says_what_each_process_holds():
    one = planned(1, strategy="fsdp2", fsdp2={"reduce_dtype": "bf16"})
    assert "one device has use for engine.fsdp2.reduce_dtype = bf16" in one.reasons["strategy"]
    assert not one.cuda_graphs
    parts, groups = (planned(4, strategy="fsdp2", fsdp2={"replicas": count}) for count in (2, 4))
    assert "4 processes, each with a part of each weight" in parts.reasons["strategy"]
    assert "4 processes, each with the whole model" in groups.reasons["strategy"]


@pytest.mark.parametrize(
    ("fits", "asked", "reshards"), [(True, "auto", False), (False, "auto", True), (True, True, True)]
)
def test_layers_are_let_go_after_their_forward_as_the_plan_says(fits, asked, reshards):
    def engine_of(reshards):
        return {"strategy": "fsdp2", "fsdp2": {"reshard_after_forward": reshards}, "micro_batch_size": 1}

    engine, machine = engine_of(asked), MACHINE
    if not fits:  # a little more than it takes where they are let go
        least = planned(8, adapter=False, **engine_of(True)).memory.total
        machine = Hardware((replace(GPU, memory_bytes=least + GIB), *MACHINE.devices[1:]), num_threads=8)
    plan = planned(8, machine=machine, adapter=False, **engine)
    assert plan.reshards is reshards
    sharding = parallel._sharding(configured(adapter=False, **engine), plan)
    assert sharding.reshard_after_forward is reshards


@pytest.mark.parametrize(("count", "sharing", "what"), [(3, 1, "to 3 processes"), (6, 2, "to 3 groups of 2 processes")])
def test_rows_that_cannot_be_dealt_out_are_refused_with_what_would_do(count, sharing, what):
    with pytest.raises(PlanError, match=rf"train.batch_size = 8 .* {what}. Use a multiple of 3"):
        planned(count, context_parallel=sharing)
