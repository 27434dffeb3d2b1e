import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from stoker.data.workers import InProcess, Workers
from stoker.errors import DataError

JOB = """
import os, signal, time
from stoker.errors import DataError

class Job:
    def double(self, task):
        time.sleep(0.002 * (task % 3))
        return 2 * task, os.getpid()

    def big(self, task):
        return bytes(task)

    def refuse(self, task):
        raise DataError("bad row", where=f"rows.jsonl:{task}", fix="Mend it.")

    def fail(self, task):
        return 1 // (task - 3)

    def die(self, task):
        if task == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    def chatter(self, task):
        print("a library says something", flush=True)
        return task
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose module workers find too."""
    (tmp_path / "preparation_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("preparation_job", None)
    import preparation_job

    return preparation_job.Job()


@pytest.fixture
def workers(job):
    with Workers(job, 2, describe=lambda task: f"row {task}") as pool:
        yield pool


def test_results_come_in_order_from_several_processes(workers, job):
    results = list(workers.map("double", range(40)))
    assert [value for value, _ in results] == [2 * task for task in range(40)]
    assert len({pid for _, pid in results}) == 2
    assert os.getpid() not in {pid for _, pid in results}
    assert [value for value, _ in InProcess(job).map("double", range(3))] == [0, 2, 4]


def test_tasks_are_taken_as_they_are_needed(workers):
    taken = []

    def tasks():
        for task in range(1000):
            taken.append(task)
            yield task

    results = workers.map("double", tasks())
    assert next(results)[0] == 0
    assert len(taken) <= 6


def test_maps_may_feed_one_another(workers):
    inner = (value for value, _ in workers.map("double", range(20)))
    assert [value for value, _ in workers.map("double", inner)] == [4 * task for task in range(20)]


def test_large_tasks_and_results_pass(workers):
    assert [len(result) for result in workers.map("big", [1 << 22] * 4)] == [1 << 22] * 4


def test_what_a_library_prints_does_no_harm(workers):
    assert list(workers.map("chatter", range(3))) == [0, 1, 2]


def test_an_error_on_purpose_arrives_as_it_is(workers):
    with pytest.raises(DataError, match=r"rows.jsonl:7: bad row Mend it."):
        list(workers.map("refuse", [7]))


def test_another_error_brings_its_traceback(workers):
    results = workers.map("fail", range(10))
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError(.|\n)*return 1 // \(task - 3\)"):
        next(results)


def test_a_worker_that_dies_is_an_error_that_names_its_rows(job):
    others = psutil.Process().children()
    expected = pytest.raises(DataError, match=r"row 5: a preparation worker was killed by SIGKILL.*Memory may have run")
    with expected, Workers(job, 2, describe=lambda task: f"row {task}") as pool:
        list(pool.map("die", range(10)))
    assert psutil.Process().children() == others


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from preparation_job import Job
from stoker.data.workers import Workers
with Workers(Job(), 2) as pool:
    for value, pid in pool.map("double", iter(int, 1)):
        print(pid, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(job, number, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        pids = {int(parent.stdout.readline()) for _ in range(20)}
        parent.send_signal(number)
        # Its output is read to the end: closed, it could meet that first, and complain of it too.
        _, complaint = parent.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(psutil.pid_exists, pids))
    assert complaint.count("Traceback") == (1 if number == signal.SIGINT else 0)  # the parent's own KeyboardInterrupt


def test_the_users_script_needs_no_main_guard(job, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from preparation_job import Job
        from stoker.data.workers import Workers
        print("once")
        with Workers(Job(), 1) as pool:
            print([value for value, _ in pool.map("double", range(3))])
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=Path(tmp_path))
    assert done.stdout == "once\n[0, 2, 4]\n"
