import pytest

from stoker.distributed.ranks import Place, Ranks, find_place, first_host


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
