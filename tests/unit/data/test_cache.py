import errno
import json

import numpy as np
import pytest

from stoker.data import writers
from stoker.data.prepare import SourceOptions, prepare
from stoker.errors import OutputError

ROW = {"messages": [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "yes"}]}


def folders(cache):
    """What stands in a cache besides the locks."""
    return [entry for entry in cache.iterdir() if entry.name not in (".locks", "digests.json")]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    return SourceOptions(path=str(tmp_path / "rows.jsonl"))


@pytest.fixture
def run(source, tmp_path, chatml):
    def run(tokenizer=chatml, options=source, **changes):
        arguments = {"sequence_length": 64, "cache_folder": tmp_path / "cache"} | changes
        return prepare([options], tokenizer=tokenizer, **arguments)

    return run


def test_second_time_comes_from_the_cache_and_is_the_same(run):
    first, second = run(), run()
    in_memory = run(cache_folder=None)
    assert (first.cached, second.cached, in_memory.cached) == (False, True, False)
    for other in (second, in_memory):
        assert np.array_equal(first.ids, other.ids)
        assert np.array_equal(first.trained, other.trained)
        assert np.array_equal(first.offsets, other.offsets)
        assert other.audit == first.audit
    assert isinstance(second.ids, np.memmap)


def test_whatever_shapes_the_data_changes_the_key(run, source, tmp_path, make_tokenizer):
    run()
    other_template = make_tokenizer(
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", eos="<|im_end|>"
    )
    for changes in (
        {"sequence_length": 65},
        {"train_on": "all"},
        {"train_on_end_of_turn": False},
        {"template": "llama3"},
        {"on_long": "drop"},
        {"on_bad_row": "skip"},
        {"tokenizer": other_template},
        {"options": SourceOptions(path=source.path, limit=2)},
        {"options": SourceOptions(path=source.path, format="chat")},
    ):
        assert not run(**changes).cached, changes
        assert run(**changes).cached, changes
    with (tmp_path / "rows.jsonl").open("a") as opened:
        opened.write(json.dumps(ROW) + "\n")
    assert len(run()) == 4


def test_a_truncating_call_of_the_tokenizer_does_not_change_the_key(run, chatml):
    run()
    before = chatml.backend_tokenizer.to_str()
    chatml(["a", "b c d"], truncation=True, max_length=4)
    assert chatml.backend_tokenizer.to_str() != before
    assert run().cached


@pytest.mark.parametrize("name", ["ids", "trained", "offsets", "counts", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "removed"])
def test_damaged_cache_is_made_anew_and_says_so(name, damage, run, tmp_path):
    first = run()
    ids = np.array(first.ids)
    (folder,) = folders(tmp_path / "cache")
    content = (folder / name).read_bytes()
    del first
    if damage == "removed":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    second = run()
    assert not second.cached
    assert "damaged" in second.notices[0]
    assert np.array_equal(second.ids, ids)
    assert run().cached


def test_failed_preparation_leaves_nothing_behind(run, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n{\n")
    with pytest.raises(Exception, match="not JSON"):
        run()
    assert folders(tmp_path / "cache") == []


def test_full_disk_is_an_error_that_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writers.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run()
    assert folders(tmp_path / "cache") == []


def test_cache_folder_that_is_a_file_is_an_error(run, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run(cache_folder=tmp_path / "taken")


def test_nothing_left_after_skipping_is_kept_as_empty(run, tmp_path):
    bad = {"messages": [{"role": "user"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(bad) + "\n") * 2)
    for cached in (False, True):
        result = run(on_bad_row="skip")
        assert (len(result), result.audit.bad_rows, result.cached) == (0, 2, cached)
