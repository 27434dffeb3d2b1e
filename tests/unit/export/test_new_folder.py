import collections
import os

import pytest
from filelock import FileLock

from stoker.errors import OutputError
from stoker.export.new_folder import new_folder

USAGE = collections.namedtuple("usage", "total used free")


def test_a_folder_appears_when_all_is_written(tmp_path):
    out = tmp_path / "new" / "out"
    with new_folder(out, needed_bytes=1) as aside:
        (aside / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_or_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out", needed_bytes=1) as aside:
        (aside / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "half").write_text("x")
    (tmp_path / ".out.lock").write_text("")
    with new_folder(tmp_path / "out", needed_bytes=1) as aside:
        assert list(aside.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.export.new_folder.shutil.disk_usage", lambda path: USAGE(0, 0, 3 << 30))
    with (
        pytest.raises(OutputError, match=r"it takes 4\.0 GiB, and 3\.0 GiB are free there.*Free space"),
        new_folder(tmp_path / "out", needed_bytes=4 << 30),
    ):
        raise AssertionError("entered")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    refused = pytest.raises(OutputError, match="another process is writing it")
    with FileLock(tmp_path / ".out.lock"), refused, new_folder(tmp_path / "out", needed_bytes=1):
        raise AssertionError("entered")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is not a folder"), new_folder(tmp_path / "out", needed_bytes=1):
        raise AssertionError("entered")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), new_folder(tmp_path / "out", needed_bytes=1):
        raise AssertionError("entered")
