"""Streams over several ranks, which here are threads that meet at a barrier."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from stoker.data.collate import Collator
from stoker.data.prepare import SourceOptions, describe
from stoker.data.shared_pool import SharedPool
from stoker.data.stream_loader import StreamLoader
from stoker.data.streaming import StreamedWindows
from stoker.data.windows import RowStream
from stoker.data.workers import InProcess
from stoker.errors import DataError

LENGTH = 32


class Meeting:
    """Lets so many threads exchange values."""

    def __init__(self, count):
        self._barrier = threading.Barrier(count, timeout=20)
        self._values = [None] * count
        self.abort = self._barrier.abort

    def exchange(self, rank):
        def give(value):
            self._values[rank] = value
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
            return found

        return give


def on_ranks(count, work):
    """Returns what `work(rank, exchange)` returns on each rank."""
    meeting = Meeting(count)

    def one(rank):
        try:
            return work(rank, meeting.exchange(rank))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        found = [threads.submit(one, rank) for rank in range(count)]
        errors = [error for error in (one.exception() for one in found) if error is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [one.result() for one in found]


class Squares:
    """Remembers what it was asked."""

    def __init__(self, bad=None):
        self.asked = []
        self._bad = bad

    def square(self, number):
        self.asked.append(number)
        if number == self._bad:
            raise DataError("a bad number", where=f"numbers:{number}")
        return number * number


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_each_rank_does_its_part_and_gets_all(ranks, count):
    def work(rank, exchange):
        job = Squares()
        pool = SharedPool(InProcess(job), exchange, rank=rank, world_size=ranks)
        return job.asked, list(pool.map("square", range(count)))

    for rank, (asked, results) in enumerate(on_ranks(ranks, work)):
        assert asked == list(range(rank, count, ranks))
        assert results == [number * number for number in range(count)]


def test_an_error_of_one_rank_is_raised_on_all_and_after_the_results_before_it():
    def work(rank, exchange):
        pool = SharedPool(InProcess(Squares(bad=4)), exchange, rank=rank, world_size=3)
        results = pool.map("square", range(20))
        found = [next(results) for _ in range(4)]
        with pytest.raises(DataError, match="numbers:4: a bad number"):
            next(results)
        return found

    assert on_ranks(3, work) == [[0, 1, 4, 9]] * 3


def test_an_error_while_rows_are_read_is_raised_on_all():
    def rows():
        yield from range(3)
        raise DataError("the disk is gone")

    def work(rank, exchange):
        pool = SharedPool(InProcess(Squares()), exchange, rank=rank, world_size=2)
        with pytest.raises(DataError, match="the disk is gone"):
            list(pool.map("square", rows()))

    on_ranks(2, work)


class Counting:
    """Makes documents as `maker` does, and counts the rows."""

    def __init__(self, maker):
        self._maker = maker
        self.rows = 0

    def make(self, chunk):
        self.rows += len(chunk.rows)
        return self._maker.make(chunk)


@pytest.fixture
def sources(tmp_path):
    """Two files of 90 and 40 texts of different lengths."""
    found = []
    for name, count in (("a", 90), ("b", 40)):
        rows = [{"text": f"{name} {number} " + "hot " * (number * 7 % 11)} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(SourceOptions(path=str(tmp_path / f"{name}.jsonl")))
    return found


@pytest.fixture
def steps(sources, chatml, monkeypatch):
    """Returns the steps of every rank, the position after them, and how many rows each rank tokenised."""
    monkeypatch.setattr("stoker.data.preparation.CHUNK_ROWS", 7)

    def run(world_size, indices, *, packing, weights, at=None):
        def work(rank, exchange):
            preparation = describe(sources, tokenizer=chatml, sequence_length=LENGTH, on_long="drop")
            job = Counting(preparation.maker)
            pool = SharedPool(InProcess(job), exchange, rank=rank, world_size=world_size)
            parts = [(0, 1)] if weights is None else [(0,), (1,)]
            capacity = LENGTH if packing else None
            streams = [
                RowStream(
                    StreamedWindows(preparation, part, pool, window_tokens=300), seed=5, salt=n, capacity=capacity
                )
                for n, part in enumerate(parts)
            ]
            collator = Collator(2, LENGTH, packing, rank, world_size, pad_id=0)
            loader = StreamLoader(
                streams, collator=collator, batch_size=12, seed=5, steps_per_epoch=100, weights=weights
            )
            if at is not None:
                loader.seek(indices[0], at)
            return [loader.step(index) for index in indices], loader.position(), job.rows

        found = on_ranks(world_size, work)
        positions = {json.dumps(position) for _, position, _ in found}
        assert len(positions) == 1
        return [one for one, _, _ in found], found[0][1], [rows for _, _, rows in found]

    return run


def rows_of(ranks, step):
    """Each row of a step over all ranks, with its targets."""
    return sorted(
        (tuple(ids), tuple(targets))
        for rank in ranks
        for batch in rank[step]
        for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True)
    )


# The fixture only makes loaders; examples share nothing through it.
@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 8),
    world_sizes=st.permutations([1, 2, 3, 4]),
    packing=st.booleans(),
    weights=st.sampled_from([None, (3.0, 1.0)]),
)
def test_the_rows_of_a_step_are_the_same_over_any_number_of_ranks_also_resumed(
    count, world_sizes, packing, weights, steps
):
    first, second = world_sizes[:2]
    options = {"packing": packing, "weights": weights}
    indices = list(range(count + 2))
    unbroken, _, _ = steps(first, indices, **options)
    _, position, _ = steps(first, indices[:count], **options)
    resumed, _, _ = steps(second, indices[count:], at=json.loads(json.dumps(position)), **options)
    again, _, _ = steps(first, indices[count:], at=position, **options)
    for number in range(2):
        if packing:  # unpacked rows are padded to their micro-batch's width, which differs
            assert rows_of(resumed, number) == rows_of(unbroken, count + number)
        for rank in range(first):
            one, other = again[rank][number], unbroken[rank][count + number]
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, other, strict=True))
            assert all(torch.equal(a.targets, b.targets) for a, b in zip(one, other, strict=True))


def test_a_rank_tokenises_its_share_alone(steps):
    indices = list(range(12))
    _, _, (alone,) = steps(1, indices, packing=True, weights=None)
    _, _, shared = steps(4, indices, packing=True, weights=None)
    assert max(shared) <= alone / 4 + 2 * 7
    assert alone <= sum(shared) <= alone + 4 * 7
