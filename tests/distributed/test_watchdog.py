"""A process that hangs is named, with what it was doing, and all of them end."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from stoker.distributed.ranks import Place, Ranks
from stoker.distributed.rounds import agree
from stoker.distributed.watchdog import Judge, Watchdog, Whereabouts
from stoker.errors import HangError, TrainingError


def places(*orders):
    return {
        rank: Whereabouts(finished, number, phase, f"host{rank}")
        for rank, (finished, number, phase) in enumerate(orders)
    }


def test_the_rank_furthest_behind_is_named_once_it_has_stood_still_for_long():
    judge = Judge(timeout=10.0)
    at = places((6, 5, "adding up the loss"), (6, 2, "reading data"))
    assert judge.look(at, now=0.0) is None
    assert judge.look(at, now=9.9) is None
    rank, sentence = judge.look(at, now=10.0)
    assert rank == 1
    assert "rank 1 (host1) has not finished step 7" in sentence
    assert "for 10 seconds its last phase has been: reading data" in sentence
    assert "(adding up the loss)" in sentence


def test_a_rank_that_moves_is_left_alone_and_the_others_may_wait_for_it():
    judge = Judge(timeout=10.0)
    for second in range(0, 60, 5):
        slow = places((6, 5, "adding up the loss"), (5, second, "evaluating"))
        assert judge.look(slow, now=float(second)) is None


def test_when_all_stand_at_the_same_point_all_are_named():
    judge = Judge(timeout=1.0)
    at = places((2, 3, "optimiser step"), (2, 3, "optimiser step"))
    judge.look(at, now=0.0)
    assert "all of them have been at the same point for 5 seconds, optimiser step" in judge.look(at, now=5.0)[1]


def test_who_works_is_named_before_who_waits_in_the_same_phase():
    """Where a backward reduces, its end is a wait for the others."""
    judge = Judge(timeout=1.0)
    phase = "forward and backward of micro-batch 1 of 1"
    at = {
        0: Whereabouts(8, 3, phase, "a", "_engine_run_backward", "graph.py:10"),
        1: Whereabouts(8, 3, phase, "b", "read_page", "rows.py:7"),
    }
    judge.look(at, now=0.0)
    rank, sentence = judge.look(at, now=2.0)
    assert rank == 1
    assert "rank 1 (b) has not finished step 9" in sentence
    assert f"{phase} (in read_page, rows.py:7)" in sentence
    assert "wait for it (forward and backward of micro-batch 1 of 1, in _engine_run_backward)" in sentence


def on_threads(count, work):
    """Runs `work(rank)` in so many threads, which stand for processes, and returns what each returned."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def wait_where_it_hangs(told):
    assert told.wait(20.0)


@pytest.mark.parametrize("hanging", [0, 2])
def test_every_process_ends_with_the_same_verdict_and_writes_where_it_stood(store, tmp_path, hanging):
    """Three steps; then one rank reads data without end, and the others wait for it."""
    meet = threading.Barrier(3)

    def run(rank):
        told, errors = threading.Event(), []

        def fail(error, speaks):
            errors.append((error, speaks))
            told.set()

        options = {"rank": rank, "world_size": 3, "folder": tmp_path / "hang", "fail": fail}
        with Watchdog(store, timeout_seconds=0.6, interval_seconds=0.05, **options) as watchdog:
            for step in range(3):
                watchdog.at("reading data", step)
                watchdog.at("adding up the loss of all ranks", step)
                meet.wait()
            watchdog.at("reading data", 3)
            if rank != hanging:
                watchdog.at("adding up the loss of all ranks", 3)
            wait_where_it_hangs(told)
        return errors

    errors = [one for found in on_threads(3, run) for one in found]
    assert [type(one) for one, _ in errors] == [HangError] * 3
    assert [rank for rank, (_, speaks) in enumerate(errors) if speaks] == [1 if hanging == 0 else 0]
    assert len({str(one) for one, _ in errors}) == 1
    message = str(errors[0][0])
    assert f"rank {hanging} (" in message
    assert "has not finished step 4" in message
    assert "its last phase has been: reading data" in message
    assert str(tmp_path / "hang" / f"rank-{hanging}.txt") in message
    assert "wait_where_it_hangs" in (tmp_path / "hang" / f"rank-{hanging}.txt").read_text()


def test_a_run_that_goes_well_leaves_no_trace(store, tmp_path):
    def run(rank):
        options = {"rank": rank, "world_size": 2, "folder": tmp_path / "hang", "fail": lambda error, speaks: 1 / 0}
        with Watchdog(store, timeout_seconds=0.3, interval_seconds=0.02, **options) as watchdog:
            for step in range(8):
                watchdog.at("reading data", step)
                time.sleep(0.08)  # twice the timeout in all, a quarter of it a step

    on_threads(2, run)
    assert not (tmp_path / "hang").exists()


def test_a_start_takes_no_word_of_an_earlier_one_for_its_own(store):
    """The store is still there after a restart, and a replaced machine has counted no restarts at all."""
    names = []
    for _ in range(3):
        found = on_threads(3, lambda rank: agree(store.clone(), rank=rank, world_size=3, timeout=timedelta(seconds=20)))
        assert len(set(found)) == 1
        names += found
    assert len(set(names)) == 3


def test_all_may_take_as_long_as_they_like_before_they_meet(store):
    """A process that tokenises for an hour keeps the others waiting, and no timeout ends that."""
    store.set_timeout(timedelta(seconds=0.05))
    went_on = []

    def run(rank):
        ranks = Ranks(Place(rank, 3, rank), store=store.clone())
        time.sleep(0.3 * rank)
        went_on.append((rank, "came"))
        ranks.wait_for_all("prepared")
        went_on.append((rank, "left"))

    on_threads(3, run)
    assert {what for _, what in went_on[:3]} == {"came"}
    assert sorted(went_on[3:]) == [(0, "left"), (1, "left"), (2, "left")]


def test_who_does_not_come_is_named(store):
    with pytest.raises(TrainingError, match="rank 1, 2 of 3 did not come"):
        agree(store, rank=0, world_size=3, timeout=timedelta(seconds=0.1))
    with pytest.raises(TrainingError, match="rank 0 did not come"):
        agree(store, rank=1, world_size=3, timeout=timedelta(seconds=0.1))
