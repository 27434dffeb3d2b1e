"""What the plan of one process becomes beside others."""

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


def planned(count, **engine):
    values = {
        "model": {"base": "some/model"},
        "adapter": {"rank": 16},
        "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 512, "packing": False},
        "train": {"learning_rate": 2e-4, "batch_size": 8},
        "engine": engine,
        "output": {"folder": "runs/x"},
    }
    config = parse(values)
    plan = choose_over(parallel.share_of_one(config, count), SPEC, MACHINE, num_processes=count)
    return parallel.spread(plan, config, count)


def test_graphs_are_refused_over_processes_where_they_are_asked_for_and_left_out_where_not():
    assert planned(1, cuda_graphs=True).cuda_graphs
    with pytest.raises(PlanError, match=r"engine.cuda_graphs = true is for one process; the strategy is ddp. Use auto"):
        planned(2, cuda_graphs=True)
    plan = planned(2)
    assert not plan.cuda_graphs
    assert plan.reasons["cuda_graphs"] == "graphs are for one process"


@pytest.mark.parametrize(("count", "sharing", "what"), [(3, 1, "to 3 processes"), (6, 2, "to 3 groups of 2 processes")])
def test_rows_that_cannot_be_dealt_out_are_refused_with_what_would_do(count, sharing, what):
    with pytest.raises(PlanError, match=rf"train.batch_size = 8 .* {what}. Use a multiple of 3"):
        planned(count, context_parallel=sharing)
