import os

import pytest

from stoker.checkpoint import durable
from stoker.checkpoint.durable import DurableFile


def test_everything_is_written_when_the_system_takes_little_at_a_time(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(durable.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    with DurableFile(tmp_path / "x") as file:
        file.write(b"ten bytes.")
    assert (tmp_path / "x").read_bytes() == b"ten bytes."
    assert file.num_bytes == 10


def test_data_larger_than_a_piece_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_PIECE_BYTES", 4)
    with DurableFile(tmp_path / "x") as file:
        file.write(b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert file.sha256 == durable.sha256_of(tmp_path / "x")


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError):
        DurableFile(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


def test_file_is_flushed_to_the_disk_when_done(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(durable.os, "fsync", flushed.append)
    with DurableFile(tmp_path / "x") as file:
        file.write(b"x")
        assert flushed == []
    assert len(flushed) == 1
    durable.sync_folder(tmp_path)
    assert len(flushed) == 2
