import os
import random
import subprocess
import sys

import pytest

from stoker.distributed.ranks import Place, Ranks, find_place, first_host, join
from stoker.errors import TrainingError


def test_the_places_that_launchers_give_are_found():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    assert find_place(torchrun) == Place(5, 8, 1, "torchrun")
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    assert find_place(slurm) == Place(3, 4, 1, "slurm")


def test_a_batch_script_of_slurm_is_one_process():
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) is None
    assert find_place({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],login1", "gpu07"), ("a,b", "a"), ("node3", "node3"), ("n[1,4]-ib", "n1-ib")],
)
def test_the_first_host_of_a_list_of_slurm(nodes, first):
    assert first_host(nodes) == first


def test_alone_there_is_nobody_to_ask():
    ranks = Ranks()
    assert ranks.sum([1.0, 2.0]) == [1.0, 2.0]
    assert ranks.gather("a") == ["a"]
    assert ranks.share(lambda: 3) == 3
    ranks.require_same({"a": 1})


def test_mpirun_and_accelerate_give_places_too():
    openmpi = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert find_place(openmpi) == Place(5, 8, 1, "mpi")
    assert find_place(openmpi | {"OMPI_COMM_WORLD_SIZE": "1"}) is None
    accelerate = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    assert find_place(accelerate) == Place(1, 2, 1, "torchrun")


def test_several_machines_of_mpirun_must_be_told_where_the_first_one_is(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(TrainingError, match="-x MASTER_ADDR=HOST"):
        join(Place(1, 4, 1, "mpi"), kind="cpu")


MEET = """
import os
from stoker.distributed.ranks import find_place, join

ranks = join(find_place(os.environ), kind="cpu")
print(ranks.sum([ranks.rank + 1.0]), ranks.gather(ranks.place.local_rank))
ranks.leave()
"""


@pytest.mark.skipif(os.environ.get("STOKER_TEST_ALL") != "1", reason="make test-distributed runs it")
@pytest.mark.parametrize("launcher", ["slurm", "mpi"])
def test_processes_that_a_launcher_numbers_find_each_other(launcher):
    job = str(random.randrange(10_000))
    numbered = {
        "slurm": {"SLURM_PROCID": "{}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "{}", "SLURM_JOB_ID": job}
        | {"SLURM_STEP_NODELIST": "localhost"},
        "mpi": {"OMPI_COMM_WORLD_RANK": "{}", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{}"}
        | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEET],
            env=os.environ | {name: value.format(rank) for name, value in numbered[launcher].items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [one.communicate(timeout=120)[0] for one in started] == ["[3.0] [0, 1]\n"] * 2
