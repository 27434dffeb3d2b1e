import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from stoker.checkpoint import write
from stoker.checkpoint.read import load_latest
from stoker.checkpoint.write import save
from stoker.errors import CheckpointError


class FailingDisk:
    """Lets the first `allowed` calls of os.write, os.fsync, mkdir and rename through; each later one fails."""

    def __init__(self, monkeypatch, allowed, code=errno.ENOSPC):
        self.calls, self.allowed, self.code, self.failed = 0, allowed, code, []
        for owner, name in ((os, "write"), (os, "fsync"), (pathlib.Path, "mkdir"), (pathlib.Path, "rename")):
            monkeypatch.setattr(owner, name, self.guard(name, getattr(owner, name)))

    def guard(self, name, function):
        def guarded(*arguments, **options):
            self.calls += 1
            if self.calls > self.allowed:
                self.failed.append(name)
                raise OSError(self.code, os.strerror(self.code))
            return function(*arguments, **options)

        return guarded


def calls_of_a_save(tmp_path, content):
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch, 10**6)
        save(tmp_path / "count", 1, **content())
        save(tmp_path / "count", 1, **content())
    return disk.calls


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, content):
    path, num_bytes = save(tmp_path, 12, **content(0.1))
    loaded = load_latest(tmp_path)
    assert path == loaded.path == tmp_path / "step-000012"
    assert loaded.step == 12
    assert loaded.values == content(0.1)["values"]
    for group, tensors in content(0.1)["tensors"].items():
        assert set(loaded.tensors[group]) == set(tensors)
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in tensors.items())
    assert num_bytes == sum(file.stat().st_size for file in path.iterdir())
    names = {"weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {file.name for file in path.iterdir()} == names


def test_a_full_disk_at_any_call_leaves_the_last_good_checkpoint(tmp_path, content):
    failures = set()
    for allowed in range(calls_of_a_save(tmp_path, content)):
        folder = tmp_path / f"after-{allowed}"
        save(folder, 1, **content(1.0))
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, allowed)
            try:
                save(folder, 2, **content(2.0))
            except CheckpointError as error:
                assert "No space left on device" in str(error)
                assert "Free space" in str(error)
                assert "--resume" in str(error)
            else:
                assert not disk.failed
        failures.update(disk.failed)
        # Once the new one has its name it is whole, though the folder's name list could not be flushed.
        loaded = load_latest(folder)
        assert loaded.rejected == ()
        assert loaded.values["fill"] == loaded.step
        assert {path.name for path in folder.iterdir()} <= {"step-000001", "step-000002"}
        if disk.failed and disk.failed[0] != "fsync":
            assert loaded.step == 1
    assert failures == {"write", "fsync", "mkdir", "rename"}


def test_a_full_disk_at_any_call_of_a_second_save_of_a_step_leaves_one_of_the_two(tmp_path, content):
    for allowed in range(calls_of_a_save(tmp_path, content)):
        folder = tmp_path / f"after-{allowed}"
        save(folder, 1, **content(1.0))
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, allowed)
            try:
                save(folder, 1, **content(2.0))
            except CheckpointError:
                assert disk.failed
        loaded = load_latest(folder)
        assert loaded.step == 1
        assert loaded.values["fill"] in (1.0, 2.0)
        save(folder, 1, **content(3.0))
        assert load_latest(folder).values["fill"] == 3.0
        assert [path.name for path in folder.iterdir()] == ["step-000001"]


def test_saving_a_step_again_replaces_it(tmp_path, content):
    save(tmp_path, 1, **content(1.0))
    save(tmp_path, 1, **content(2.0))
    assert load_latest(tmp_path).values["fill"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path, content):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        save(tmp_path / "file", 1, **content())


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path, content):
    (tmp_path / ".step-000001.part").mkdir()
    (tmp_path / ".step-000000.deleted").mkdir()
    save(tmp_path, 2, **content())
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_values_that_json_cannot_hold_exactly_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 1, tensors={}, values={"loss": float("nan")})


KILLED = """
import sys, torch
from pathlib import Path
from stoker.checkpoint.write import save
step = 0
while True:
    step += 1
    fill = torch.full((4096,), float(step))
    save(Path(sys.argv[1]), step % 3 + 1, tensors={"weights": {"w": fill}}, values={"fill": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_saves_always_leaves_a_whole_checkpoint(tmp_path):
    for round_ in range(3):
        folder = tmp_path / str(round_)
        child = subprocess.Popen([sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True)
        for _ in range(4 + round_):
            last = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        child.wait()
        done = [last, *map(int, child.stdout.read().split())][-1]
        loaded = load_latest(folder)
        assert loaded.rejected == ()
        assert set(loaded.tensors["weights"]["w"].tolist()) == {float(loaded.values["fill"])}
        assert loaded.values["fill"] >= done - 2
        child.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file size")
def test_a_file_that_the_system_cuts_off_leaves_the_last_good_checkpoint(tmp_path, content):
    import resource

    save(tmp_path, 1, **content())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*Free space"):
            save(tmp_path, 2, tensors={"weights": {"w": torch.zeros(65536)}}, values={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert load_latest(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_the_partial_folder_is_removed_even_when_cleaning_up_meets_errors(tmp_path, content, monkeypatch):
    removed = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        write.shutil, "rmtree", lambda *args, **options: (removed.append(args), rmtree(*args, **options))
    )
    with pytest.MonkeyPatch.context() as patch:
        FailingDisk(patch, 3)
        with pytest.raises(CheckpointError):
            save(tmp_path, 2, **content())
    assert removed
    assert list(tmp_path.iterdir()) == []
