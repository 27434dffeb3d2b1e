"""Processes that prepare rows side by side: chunks go out, results come back in order, few at a time in memory.

A worker is this interpreter started anew on `stoker.data.worker`, joined to us by two pipes. It imports no script of
the user's (as `multiprocessing`'s spawned processes do, which need a guarded main module), holds no copy of our memory
or of a GPU (as forked ones do), and ends when its pipe closes, so that none outlives a parent that is killed.
"""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol, TypeVar

from stoker.errors import DataError, StokerError

_Task = TypeVar("_Task")
_AHEAD = 3
"""Chunks a worker has waiting, so that it never waits for us."""
_GRACE_SECONDS = 2.0


class Pool(Protocol):
    """Runs tasks; `map` gives their results in the tasks' order."""

    def __enter__(self) -> "Pool": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def map(self, name: str, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields `getattr(job, name)(task)` for each task, in order, taking tasks as they are needed."""
        ...


class InProcess:
    """Runs tasks of `job` here, one when its result is asked for."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def map(self, name: str, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the results in order."""
        return map(getattr(self._job, name), tasks)


class Workers:
    """Runs tasks of `job`, a picklable object, in `num_workers` processes.

    `describe` says where a task's rows stand, for the error when its worker dies. An error that `job` raises on purpose
    (a StokerError) is raised here as it is; any other with the worker's traceback.
    """

    def __init__(self, job: Any, num_workers: int, *, describe: Callable[[Any], str] = repr) -> None:
        self._job = pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL)
        self._num_workers = num_workers
        self._describe = describe
        self._tasks: SimpleQueue[tuple[Future[Any], str, Any] | None] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Workers":
        # A worker may use one core: libraries that start a thread for each would fight over them.
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        for _ in range(self._num_workers):
            process = subprocess.Popen(
                [sys.executable, "-m", "stoker.data.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            thread = threading.Thread(target=self._serve, args=(process,), daemon=True)
            self._processes.append(process)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()  # nobody waits for these any more
        for _ in self._threads:
            self._tasks.put(None)
        if kind is not None:
            for process in self._processes:
                process.kill()
        for process, thread in zip(self._processes, self._threads, strict=True):
            thread.join()
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def map(self, name: str, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the results in order; some tasks are taken ahead, so that every worker is busy."""
        waiting: deque[Future[Any]] = deque()
        limit = _AHEAD * self._num_workers
        for task in tasks:
            future: Future[Any] = Future()
            waiting.append(future)
            self._tasks.put((future, name, task))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _serve(self, process: "subprocess.Popen[bytes]") -> None:
        """Hands tasks to one worker until there are none; a worker that died fails its task and all that follow."""
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # the worker is gone; its next task says so
            process.stdin.write(self._job)
        while (order := self._tasks.get()) is not None:
            future, name, task = order
            try:
                pickle.dump((name, task), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
                process.stdin.flush()
                answer = pickle.load(process.stdout)  # noqa: S301 - our own process wrote it
            except (OSError, EOFError, pickle.UnpicklingError):
                future.set_exception(_death(process, self._describe(task)))
                continue
            if isinstance(answer, _Failure):
                future.set_exception(answer.error)
            else:
                future.set_result(answer)
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()


class _Failure:
    """What a worker sends instead of a result."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def serve() -> None:
    """What a worker does: reads a job and then tasks from standard input, writes results to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes our pipe then
    tasks = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between results
    job = pickle.load(tasks)  # noqa: S301 - our own parent wrote it
    # What is loaded by now stays; looking through it again and again for garbage costs a tenth of the time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    while True:
        try:
            name, task = pickle.load(tasks)  # noqa: S301
        except EOFError:
            return
        try:
            answer = getattr(job, name)(task)
        except StokerError as error:
            answer = _Failure(error)
        except Exception as error:  # noqa: BLE001 - the parent raises it
            import traceback

            answer = _Failure(RuntimeError(f"{error!r} in a preparation worker:\n{traceback.format_exc()}"))
        try:
            pickle.dump(answer, results, protocol=pickle.HIGHEST_PROTOCOL)
            results.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent is gone, and flushing at exit would complain


def _death(process: "subprocess.Popen[bytes]", where: str) -> DataError:
    code = process.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    memory = " Memory may have run out (the system kills the largest process)." if code == -signal.SIGKILL else ""
    return DataError(
        f"a preparation worker {how} while it worked on these rows.{memory}",
        where=where,
        fix="Lower data.num_workers, or set it to 0 to prepare in the main process and see what happens.",
    )
