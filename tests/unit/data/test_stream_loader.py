import json
import threading
import time
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from stoker.data.collate import Collator
from stoker.data.growing import GrowingWindows
from stoker.data.prepare import SourceOptions, describe, prepare
from stoker.data.prepared import Prepared
from stoker.data.stream_loader import StreamLoader
from stoker.data.streaming import StreamedWindows
from stoker.data.tokens import Tokens
from stoker.data.windows import RowStream
from stoker.data.workers import InProcess, Workers
from stoker.data.writers import FolderWriter
from stoker.errors import DataError

LENGTH = 32


@pytest.fixture
def files(tmp_path):
    """Two files of 90 and 40 texts of different lengths."""
    paths = []
    for name, count in (("a", 90), ("b", 40)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"{name} {number} " + "hot " * (number * 7 % 11)} for number in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(SourceOptions(path=str(path)))
    return paths


@pytest.fixture
def streamed(files, chatml, monkeypatch):
    """Makes a loader over streamed files, with windows of a few rows."""
    monkeypatch.setattr("stoker.data.preparation.CHUNK_ROWS", 7)

    def make(
        *, rank=0, world_size=1, packing=True, weights=None, shuffle=True, pool=None, window_tokens=100, ahead=False
    ):
        preparation = describe(files, tokenizer=chatml, sequence_length=LENGTH, on_long="drop")
        pool = pool or InProcess(preparation.maker)
        parts = [(0, 1)] if weights is None else [(0,), (1,)]
        streams = [
            RowStream(
                StreamedWindows(preparation, part, pool, window_tokens=window_tokens),
                seed=5,
                salt=number,
                capacity=LENGTH if packing else None,
                shuffle=shuffle,
                ahead=ahead,
            )
            for number, part in enumerate(parts)
        ]
        return loader_of(streams, rank=rank, world_size=world_size, packing=packing, weights=weights)

    return make


def loader_of(streams, *, rank=0, world_size=1, packing=True, weights=None):
    collator = Collator(2, LENGTH, packing, rank, world_size, pad_id=0)
    return StreamLoader(streams, collator=collator, batch_size=4, seed=5, steps_per_epoch=100, weights=weights)


def documents_of(batches):
    """Every document in the batches, as token ids."""
    found = []
    for batch in batches:
        for row, lengths in enumerate(batch.document_lengths or [(batch.input_ids.shape[1],)] * batch.num_rows):
            start = 0
            for length in lengths:
                trained = batch.targets[row, start : start + length] != -100
                if trained.any():
                    size = int(trained.nonzero().max()) + 2
                    found.append(tuple(batch.input_ids[row, start : start + size].tolist()))
                start += length
    return found


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_pass_holds_every_document_once(packing, shuffle, streamed, files, chatml):
    whole = prepare(files, tokenizer=chatml, sequence_length=LENGTH, on_long="drop")
    expected = Counter(tuple(whole.document(index)[0].tolist()) for index in range(len(whole)))
    loader = streamed(packing=packing, shuffle=shuffle)
    seen = Counter()
    step = 0
    while sum(seen.values()) < 3 * len(whole):
        seen.update(documents_of(loader.step(step)))
        step += 1
    assert set(seen) == set(expected)
    # Three passes, and at most one step of the fourth.
    assert all(3 * expected[document] <= seen[document] <= 4 * expected[document] for document in expected)
    if not shuffle and not packing:
        first = documents_of(streamed(packing=False, shuffle=False).step(0))
        assert sorted(first) == sorted(tuple(whole.document(index)[0].tolist()) for index in range(4))


# The fixture only makes loaders; examples share nothing through it.
@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.integers(0, 60),
    world_size=st.sampled_from([1, 2]),
    packing=st.booleans(),
    weights=st.sampled_from([None, (3.0, 1.0)]),
)
def test_a_resumed_stream_goes_on_as_an_unbroken_one(step, world_size, packing, weights, streamed):
    make = streamed
    options = {"world_size": world_size, "packing": packing, "weights": weights}
    ranks = [make(rank=rank, **options) for rank in range(world_size)]
    unbroken = [[loader.step(index) for index in range(step + 3)] for loader in ranks]
    until = make(**options)
    for index in range(step):
        until.step(index)
    position = json.loads(json.dumps(until.position()))
    assert all(isinstance(number, int) for stream in position["streams"] for number in stream)
    for rank in range(world_size):
        resumed = make(rank=rank, **options)
        resumed.seek(step, position)
        for index in range(step, step + 3):
            assert equal(resumed.step(index), unbroken[rank][index])
    # The order of rows does not depend on how many ranks there are.
    alone = make(packing=packing, weights=weights)
    together = Counter(document for loader in unbroken for document in documents_of(loader[step]))
    alone.seek(step, position)
    assert Counter(documents_of(alone.step(step))) == together


def test_any_step_may_be_asked_for(streamed):
    loader, other = streamed(), streamed()
    steps = [loader.step(index) for index in range(8)]
    assert equal(other.step(5), steps[5])
    assert equal(other.step(2), steps[2])


def test_workers_and_a_thread_ahead_change_nothing(streamed, files, chatml):
    maker = describe(files, tokenizer=chatml, sequence_length=LENGTH, on_long="drop").maker
    with Workers(maker, 1) as pool:
        ahead, alone = streamed(pool=pool, ahead=True), streamed()
        assert all(equal(ahead.step(index), alone.step(index)) for index in range(30))
        ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch" and thread.is_alive()]


def test_error_in_a_thread_ahead_arrives(streamed, files):
    with Path(files[0].path).open("a") as opened:
        opened.write("{\n")
    loader = streamed(ahead=True)
    with pytest.raises(DataError, match=r"a.jsonl:91: the line is not JSON"):
        for index in range(40):
            loader.step(index)


def test_streams_take_turns_by_weight(streamed):
    loader = streamed(weights=(3.0, 1.0))
    for index in range(25):
        loader.step(index)
    assert [stream.num_rows for stream in loader._streams] == [75, 25]


def test_nothing_trained_is_an_error_instead_of_an_endless_search(tmp_path, chatml):
    rows = [{"messages": [{"role": "user", "content": f"hot {number}?"}]} for number in range(20)]
    preparation = describe([SourceOptions(rows=rows)], tokenizer=chatml, sequence_length=LENGTH)
    windows = StreamedWindows(preparation, (0,), InProcess(preparation.maker), window_tokens=50)
    with pytest.raises(DataError, match="no document has a trained token"):
        RowStream(windows, seed=0, salt=0, capacity=LENGTH).next()


def synthetic(count, *, seed=0, longest=2048):
    lengths = np.clip(np.random.default_rng(seed).lognormal(np.log(300), 1.0, count), 8, longest).astype(np.int64)
    ids = np.repeat(np.arange(count, dtype=np.uint32), lengths)
    trained = np.ones(len(ids), dtype=bool)
    return Tokens(ids, trained, lengths)


def prepared(tokens):
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
    audit = Prepared.from_documents([]).audit
    return Prepared(tokens.ids, tokens.trained, offsets, audit)


def test_rows_of_windows_are_full(tmp_path):
    whole = prepared(synthetic(20_000))
    windows = GrowingWindows(lambda: whole, tmp_path / "x", window_tokens=256 * 2048, documents_per_example=1)
    stream = RowStream(windows, seed=0, salt=0, capacity=2048)
    for _ in range(2000):
        stream.next()
    assert stream.efficiency > 0.98


@pytest.mark.parametrize("together", [1, 2])
def test_windows_are_the_same_while_the_documents_are_written_and_afterwards(together, tmp_path):
    tokens = synthetic(1200, longest=64)
    whole = prepared(tokens)
    finished, go_on = threading.Event(), threading.Semaphore(0)

    def write():
        writer = FolderWriter(tmp_path / "key")
        with writer:
            for part in range(0, 1200, 100):
                go_on.acquire()
                cut = slice(int(whole.offsets[part]), int(whole.offsets[part + 100]))
                writer.add(Tokens(tokens.ids[cut], tokens.trained[cut], tokens.lengths[part : part + 100]))
                writer.note_progress(None)
            finished.wait()
            return writer.finish(whole.audit)

    def windows(prepare):
        return GrowingWindows(prepare, tmp_path / "key", window_tokens=1000, documents_per_example=together)

    growing_windows = windows(write)
    complete = windows(lambda: whole)
    complete.wait()
    pairs = zip(growing_windows.read((0, 0)), complete.read((0, 0)), strict=False)
    go_on.release(3)
    for number, (one, other) in enumerate(pairs):
        assert one.place == other.place
        assert [example[0][0].tolist() for example in one.examples] == [ex[0][0].tolist() for ex in other.examples]
        assert all(len(example) == together for example in one.examples)
        go_on.release()
        if number == 3:
            assert growing_windows.whole is None
        if growing_windows._end_of_window(one.place[1]) and one.place[0] == 0 and number > 40:
            finished.set()
        if one.place[0] == 1:
            break
    assert growing_windows.wait() is growing_windows.whole


def test_a_failed_preparation_is_raised_where_a_window_is_asked_for(tmp_path):
    def fail():
        raise DataError("bad row", where="rows.jsonl:7")

    windows = GrowingWindows(fail, tmp_path / "key", window_tokens=10, documents_per_example=1)
    with pytest.raises(DataError, match=r"rows.jsonl:7: bad row"):
        next(windows.read((0, 0)))


def test_window_ten_million_is_there_at_once(tmp_path):
    class Whole:
        offsets = np.arange(10_000_001, dtype=np.int64) * 4
        ids = np.zeros(40_000_000, dtype=np.uint8)
        trained = np.ones(40_000_000, dtype=bool)

    windows = GrowingWindows(Whole, tmp_path / "x", window_tokens=4096, documents_per_example=1)
    windows.wait()
    stream = RowStream(windows, seed=0, salt=0, capacity=64)
    started = time.process_time()
    stream.seek([3, 9_990_000, 5])
    stream.next()
    assert time.process_time() - started < 0.5  # 0.01 s on an idle core
