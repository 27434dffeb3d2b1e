"""Checkpoints that are written beside training, by one process or several."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stoker.checkpoint import durable
from stoker.checkpoint.read import load_latest
from stoker.checkpoint.saver import Saver
from stoker.checkpoint.stored import StoredTensors
from stoker.errors import CheckpointError


def together(work, count):
    """Runs `work(rank, gather)` in so many threads that speak to each other; returns what each one returned."""
    barrier, said = threading.Barrier(count, timeout=20), [None] * count

    def gather_of(rank):
        def gather(value):
            said[rank] = value
            barrier.wait()
            heard = list(said)
            barrier.wait()
            return heard

        return gather

    with ThreadPoolExecutor(count) as pool:
        return [one.result() for one in [pool.submit(work, rank, gather_of(rank)) for rank in range(count)]]


@pytest.fixture
def gate(monkeypatch):
    """Holds every write to the disk back until it is opened."""
    opened, write = threading.Event(), os.write

    def waits(descriptor, data):
        assert opened.wait(20)
        return write(descriptor, data)

    monkeypatch.setattr(durable.os, "write", waits)
    return opened


def test_what_is_written_is_what_was_there_when_it_began(tmp_path, content, gate):
    saver, saved = Saver(tmp_path, background=True), content(1.0)
    saver.begin(1, **saved)
    assert (saver.step, saver.is_written) == (1, False)
    saved["tensors"]["weights"]["a.weight"].fill_(9.0)  # the next step
    assert load_latest(tmp_path) is None
    gate.set()
    done = saver.commit()
    assert (done.path, saver.step) == (tmp_path / "step-000001", None)
    assert torch.equal(load_latest(tmp_path).tensors["weights"]["a.weight"], torch.full((3, 5), 1.0))
    saver.begin(2, **saved)  # into the same memory
    saver.commit()
    assert load_latest(tmp_path).tensors["weights"]["a.weight"].unique().tolist() == [9.0]


def test_one_at_a_time(tmp_path, content, gate):
    saver = Saver(tmp_path, background=True)
    saver.begin(1, **content())
    with pytest.raises(ValueError, match="step 1 is still being written"):
        saver.begin(2, **content())
    gate.set()
    saver.commit()


def test_without_room_for_a_copy_steps_wait(tmp_path, content, monkeypatch):
    memory = type("Memory", (), {"available": 100})()
    monkeypatch.setattr("stoker.checkpoint.saver.psutil.virtual_memory", lambda: memory)
    saver = Saver(tmp_path)
    saver.begin(1, **content())
    assert saver.is_written
    assert saver.commit().seconds > 0


def test_a_failure_beside_training_is_told_when_it_would_stand_and_the_one_before_stands(
    tmp_path, content, monkeypatch
):
    saver = Saver(tmp_path, background=True)
    saver.begin(1, **content(1.0))
    saver.commit()

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "write", full)
        saver.begin(2, **content(2.0))
        with pytest.raises(CheckpointError, match=r"step 2 cannot be written .*No space left on device.*Free space"):
            saver.commit()
    assert load_latest(tmp_path).values["fill"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    saver.begin(2, **content(2.0))
    saver.commit()
    assert load_latest(tmp_path).step == 2


def test_ranks_that_hold_the_same_write_each_tensor_once(tmp_path, content):
    def work(rank, gather):
        saver = Saver(tmp_path, rank=rank, world_size=3, gather=gather)
        saver.begin(4, **content(0.5))
        return saver.commit()

    saved = together(work, 3)
    files = sorted(path.name for path in saved[0].path.glob("*.safetensors"))
    assert len({one.num_bytes for one in saved}) == 1
    assert files != ["optimizer.safetensors", "weights.safetensors"]
    names = [name for path in files for name in StoredTensors([saved[0].path / path])]
    assert len(names) == len(set(names)) == 4
    loaded = load_latest(tmp_path)
    for group, tensors in content(0.5)["tensors"].items():
        assert set(loaded.tensors[group]) == set(tensors)
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in tensors.items())


def test_a_rank_that_cannot_write_is_named_on_every_rank(tmp_path, content, monkeypatch):
    write = durable.os.write

    def full(descriptor, data):
        if threading.current_thread().name == "checkpoint 4" and b"a.bias" in bytes(data):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(durable.os, "write", full)

    def work(rank, gather):
        saver = Saver(tmp_path, rank=rank, world_size=2, gather=gather)
        saver.begin(4, **content(0.5))
        with pytest.raises(CheckpointError) as caught:
            saver.commit()
        return str(caught.value)

    first, second = together(work, 2)
    assert first == second
    assert "of 2: The checkpoint of step 4 cannot be written" in first
    assert load_latest(tmp_path) is None


def test_a_folder_that_cannot_be_made_is_told_on_every_rank(tmp_path, content):
    (tmp_path / "file").write_text("")

    def work(rank, gather):
        with pytest.raises(CheckpointError, match="cannot be written"):
            Saver(tmp_path / "file", rank=rank, world_size=2, gather=gather).begin(1, **content())
        return True

    assert together(work, 2) == [True, True]


SLOW = """
import os, sys, time, torch
from pathlib import Path
from stoker.checkpoint import durable
from stoker.checkpoint.saver import Saver
saver = Saver(Path(sys.argv[1]), background=True)
tensors = {"weights": {"a": torch.ones(4)}}
saver.begin(1, tensors=tensors, values={})
saver.commit()
write = os.write
def slow(descriptor, data):
    if descriptor > 2:
        print("writing", flush=True)
        time.sleep(60)
    return write(descriptor, data)
durable.os.write = slow
saver.begin(2, tensors=tensors, values={})
time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_the_one_before(tmp_path, content):
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".step-000002.part"]
    assert load_latest(tmp_path).step == 1
    saver = Saver(tmp_path)
    saver.begin(2, **content())
    saver.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
