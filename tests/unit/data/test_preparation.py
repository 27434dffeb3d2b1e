import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stoker.data import cache_list, documents, writers
from stoker.data.cache import key
from stoker.data.prepare import SourceOptions, describe, prepare
from stoker.errors import DataError, OutputError


def chat(number, words=3):
    answer = " ".join(["yes"] * words)
    return {"messages": [{"role": "user", "content": f"hot {number}?"}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return SourceOptions(path=str(path))

    return write


@pytest.fixture
def run(chatml, tmp_path):
    def run(*sources, **options):
        defaults = {"sequence_length": 64, "cache_folder": tmp_path / "cache", "num_workers": 0}
        return prepare(sources, tokenizer=chatml, **(defaults | options))

    return run


def assert_same(one, other):
    for name in ("ids", "trained", "offsets", "trained_counts"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.source_starts == other.source_starts
    assert one.audit == other.audit


def mixed_rows(count):
    words = random.Random(0)
    return [chat(number, words.randint(1, 60)) for number in range(count)]


@pytest.mark.slow
def test_workers_give_what_one_process_gives(write, run):
    rows = [*mixed_rows(1500), "{", chat("long", 200), *mixed_rows(300)]
    sources = (write(rows), write([{"text": f"hot {number} hot hot"} for number in range(700)], "texts.jsonl"))
    options = {"on_bad_row": "skip", "deduplicate": True, "min_length": 5}
    sources = (*sources, write([{"text": "hot"}, {"text": "hot hot hot hot hot hot"}], "short.jsonl"))
    alone = run(*sources, cache_folder=None, **options)
    side_by_side = run(*sources, num_workers=2, **options)
    assert_same(side_by_side, alone)
    assert alone.audit.bad_rows == 1
    assert alone.audit.duplicates == 300
    assert alone.audit.short == 1
    assert alone.source_starts == (0, 1501, 2201)
    assert len(alone) == 2202
    assert side_by_side.audit.bad_row_examples[0].startswith(f"{sources[0].path}:1501: the line is not JSON")


@pytest.mark.slow
def test_error_of_a_worker_names_file_and_line(write, run):
    source = write([*mixed_rows(1100), {"messages": [{"role": "user"}]}, *mixed_rows(100)])
    with pytest.raises(DataError, match=r"rows.jsonl:1101: messages\[0\].content is missing"):
        run(source, num_workers=2)


@pytest.mark.slow
def test_first_of_several_errors_is_the_one_that_is_named(write, run):
    source = write([*mixed_rows(700), "{", *mixed_rows(600), "[]", *mixed_rows(1000)])
    with pytest.raises(DataError, match=r"rows.jsonl:701: "):
        run(source, num_workers=2)


def test_equal_rows_are_taken_once_whatever_their_order_of_fields(write, run):
    text = '{"text": "hot", "more": 1}', '{"more": 1, "text": "hot"}', '{"more": 2, "text": "hot"}'
    result = run(write(text), write(text, "again.jsonl"), deduplicate=True)
    assert (len(result), result.audit.duplicates, result.audit.rows) == (2, 4, 2)
    assert len(run(write(text))) == 3


def test_short_documents_are_left_out_and_counted(write, run):
    result = run(write([{"text": "hot"}, {"text": "hot hot hot hot"}]), min_length=4)
    assert (len(result), result.audit.short) == (1, 1)


def test_progress_tells_rows_and_share(write, run):
    seen = []
    run(write(mixed_rows(1200)), write(mixed_rows(1200), "b.jsonl"), progress=seen.append)
    assert [progress.rows for progress in seen] == [512, 1024, 1200, 1712, 2224, 2400]
    shares = [progress.share for progress in seen]
    assert shares == sorted(shares)
    assert shares[2] == pytest.approx(0.5, abs=0.01)
    assert shares[-1] == pytest.approx(1.0)


def test_unreadable_file_in_the_middle_stops_with_its_name_and_leaves_nothing(write, run, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b", "c"):
        write(mixed_rows(600), f"data/{name}.jsonl")
    (folder / "b.jsonl").rename(folder / "b.jsonl.gz")  # no gzip inside
    with pytest.raises(DataError, match=r"b.jsonl.gz: the file cannot be read"):
        run(SourceOptions(path=str(folder)), num_workers=1)
    assert cache_list.entries(tmp_path / "cache") == []


class FullDisk:
    """A file that takes so many bytes and no more."""

    left = 0

    def __init__(self, opened):
        self._opened = opened

    def write(self, content):
        FullDisk.left -= len(content)
        if FullDisk.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._opened.write(content)

    def __getattr__(self, name):
        return getattr(self._opened, name)


def test_full_disk_says_where_and_how_much_is_needed_and_leaves_nothing(write, run, tmp_path, monkeypatch):
    source, free = write(mixed_rows(3000)), 400_000
    size = sum(len(array.tobytes()) for array in (run(source, cache_folder=None).ids,)) * 5 // 4
    assert free < size
    FullDisk.left = free
    open_file = writers.FolderWriter._open

    def open_on_full_disk(self, name):
        open_file(self, name)
        self._files[name] = FullDisk(self._files[name])

    monkeypatch.setattr(writers.FolderWriter, "_open", open_on_full_disk)
    with pytest.raises(OutputError) as raised:
        run(source)
    message = str(raised.value)
    assert f"prepared data cannot be written to '{tmp_path / 'cache'}': No space left on device, after 0." in message
    needed = float(message.partition("about ")[2].partition(" MiB")[0])
    assert needed == pytest.approx(size / 2**20, rel=0.15)
    assert "stoker prepare --list" in message
    assert cache_list.entries(tmp_path / "cache") == []


SCRIPT = """
import sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from stoker.data.prepare import SourceOptions, prepare
tokenizer, rows, cache = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
result = prepare(
    [SourceOptions(path=rows)], tokenizer=PreTrainedTokenizerFast.from_pretrained(tokenizer), sequence_length=64,
    cache_folder=Path(cache), num_workers=0,
    progress=lambda progress: print("waiting" if progress.waiting else progress.rows, flush=True),
)
print("cached" if result.cached else "made", len(result.ids), int(result.ids.sum()), flush=True)
"""


@pytest.fixture
def start(chatml, tmp_path):
    """Starts a process that prepares `rows.jsonl` once it is told to go on."""
    chatml.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start():
        arguments = [tmp_path / "script.py", tmp_path / "tokenizer", tmp_path / "rows.jsonl", tmp_path / "cache"]
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.slow
def test_killed_preparation_leaves_no_half_and_the_next_one_is_whole(write, run, start, tmp_path):
    source = write(mixed_rows(6_000))
    process = start()
    process.stdin.write("go\n")
    assert process.stdout.readline() == "512\n"
    process.kill()
    process.wait()
    (left,) = cache_list.entries(tmp_path / "cache")
    assert left.stale == "its preparation was cut off"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed_rows(200)))
    other = run(source)  # another key: the leftover is not in its way
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed_rows(6_000)[:600]))
    assert not other.cached
    assert cache_list.prune(tmp_path / "cache")[-1].stale
    assert_same(run(source), run(source, cache_folder=None))
    assert run(source).cached


@pytest.mark.slow
def test_several_processes_prepare_once_and_the_others_wait(write, start):
    write(mixed_rows(3000))
    both = [start(), start()]
    for process in both:
        process.stdin.write("go\n")
    outputs = [process.communicate(timeout=60)[0].split("\n") for process in both]
    made = [lines[-2].split(" ", 1) for lines in outputs]
    assert sorted(how for how, _ in made) == ["cached", "made"]
    assert made[0][1] == made[1][1]
    assert "waiting" in next(lines for lines, (how, _) in zip(outputs, made, strict=True) if how == "cached")


def test_worker_that_is_killed_names_the_rows_it_worked_on(write, run, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['DIES'] = '1'\n")
    reader = (
        "import stoker.data.documents as d, os, signal\nd.parsed = lambda raw: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(reader)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DataError, match=r"rows.jsonl:1 to .*rows.jsonl:20: a preparation worker was killed by SIGKILL"):
        run(write(mixed_rows(20)), num_workers=1)
    assert cache_list.entries(tmp_path / "cache") == []


def test_list_names_what_was_made_from_what_and_why_it_is_stale(write, run, tmp_path, monkeypatch):
    rows, other = write(mixed_rows(20)), write(mixed_rows(30), "other.jsonl")
    run(rows)
    run(other)
    entries = {entry.sources: entry for entry in cache_list.entries(tmp_path / "cache")}
    assert set(entries) == {(rows.path,), (other.path,)}
    assert all(not entry.stale and entry.num_bytes > 0 and entry.documents for entry in entries.values())
    os.utime(rows.path)  # touched, not changed
    write(mixed_rows(31), "other.jsonl")
    stale = {entry.sources: entry.stale for entry in cache_list.entries(tmp_path / "cache")}
    assert stale == {(rows.path,): "", (other.path,): f"{other.path} has changed"}
    assert [entry.sources for entry in cache_list.prune(tmp_path / "cache")] == [(other.path,)]
    assert run(rows).cached
    monkeypatch.setattr(cache_list, "library_versions", lambda: {"tokenizers": "9.9"})
    (entry,) = cache_list.entries(tmp_path / "cache")
    assert entry.stale.startswith("made with transformers ")


def test_data_of_another_folder_is_not_taken_for_stale(write, run, tmp_path, monkeypatch):
    write(mixed_rows(20))
    monkeypatch.chdir(tmp_path)
    run(SourceOptions(path="rows.jsonl"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    (entry,) = cache_list.entries(tmp_path / "cache")

    assert (entry.sources, entry.stale) == (("rows.jsonl",), "")


def test_prune_removes_what_was_long_unused(write, run, tmp_path):
    run(write(mixed_rows(20)))
    (entry,) = cache_list.entries(tmp_path / "cache")
    assert cache_list.prune(tmp_path / "cache", unused_days=2) == []
    long_ago = time.time() - 3 * 86_400
    os.utime(entry.folder / "manifest.json", (long_ago, long_ago))
    assert [old.key for old in cache_list.prune(tmp_path / "cache", unused_days=2)] == [entry.key]
    assert not entry.folder.exists()


def test_unchanged_large_files_are_not_read_again_to_know_them(run, write, tmp_path, monkeypatch, chatml):
    source = write([{"text": "hot " * 300_000}])
    os.utime(source.path, (1e9, 1e9))
    options = {"tokenizer": chatml, "sequence_length": 64}

    def name():
        from stoker.data.cache import Digests

        return key(describe([source], **options).identity(Digests(tmp_path / "cache")))

    first = name()
    read = []
    monkeypatch.setattr("stoker.data.cache.storage.digest", read.append)
    assert name() == first
    assert read == []
    monkeypatch.undo()
    write([{"text": "hat " * 300_000}])
    os.utime(source.path, (1e9 + 1, 1e9 + 1))
    assert name() != first


def test_chunks_are_cut_by_rows_and_bytes(write, chatml, monkeypatch):
    monkeypatch.setattr("stoker.data.preparation._CHUNK_BYTES", 1000)
    source = write([*mixed_rows(520), {"text": "x" * 2000}, {"text": "x" * 2000}])
    preparation = describe([source], tokenizer=chatml, sequence_length=64)
    chunks = [chunk for chunk, _ in preparation.chunks(0)]
    assert max(sum(len(raw.content) for raw in chunk.rows[:-1]) for chunk in chunks) < 1000
    assert [len(chunk.rows) for chunk in chunks[-2:]][-1] == 1
    assert sum(len(chunk.rows) for chunk in chunks) == 522


def test_maker_travels_without_what_it_has_compiled(write, chatml):
    import pickle

    maker = describe([write(mixed_rows(3))], tokenizer=chatml, sequence_length=64).maker
    again = pickle.loads(pickle.dumps(maker))  # noqa: S301
    assert isinstance(again, documents.DocumentMaker)
    assert again._readers == {}


@pytest.mark.slow
def test_interrupt_leaves_nothing_behind(write, start, tmp_path):
    write(mixed_rows(6_000))
    process = start()
    process.stdin.write("go\n")
    assert process.stdout.readline() == "512\n"
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert cache_list.entries(tmp_path / "cache") == []
