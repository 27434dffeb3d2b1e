"""Turns a hang into an error that names the process which others wait for, and what it was doing.

Every process says in the store where it is: steps finished, and the phase that it has begun since. The first two read
what all say. When the process that is furthest behind has not moved for a while, their verdict goes into the store, and
every process ends with it; each writes where its Python threads stand. A thread does all this, because the main one may
never come back from a collective or a read.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from stoker.errors import HangError, StokerError

_JUDGES = (0, 1)  # The second for when the first is what hangs; more would read for nothing.
_VERDICT = "verdict"
# In these Python functions of torch a process waits for the others: the collectives, and the backward that reduces.
_WAITS = {
    "_engine_run_backward",
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "broadcast",
}
_WAITS |= {"broadcast_object_list", "reduce_scatter_tensor", "all_to_all_single", "barrier", "wait", "wait_tensor"}
_DUMP_SECONDS = 10.0


@dataclass(frozen=True)
class Whereabouts:
    """Where a process is: `finished` steps, and the `number`-th phase since then, by its name.

    `function` and `line` are of the innermost Python call of its main thread.
    """

    finished: int
    number: int
    phase: str
    host: str
    function: str = ""
    line: str = ""

    @property
    def order(self) -> tuple[int, int]:
        """What tells who is behind whom."""
        return self.finished, self.number


@dataclass(frozen=True)
class _Seen:
    place: Whereabouts
    since: float


class Judge:
    """Finds the process that all wait for: the one furthest behind, once it has stood still for `timeout` seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._seen: dict[int, _Seen] = {}

    def look(self, places: dict[int, Whereabouts], now: float) -> tuple[int, str] | None:
        """Takes in where every rank is at the time `now`; returns the rank that hangs, and the sentence on it."""
        for rank, place in places.items():
            if rank not in self._seen or self._seen[rank].place.order != place.order:
                self._seen[rank] = _Seen(place, now)
        last = min(places.values(), key=lambda place: place.order).order
        behind = [rank for rank, place in places.items() if place.order == last]
        seconds = now - max(self._seen[rank].since for rank in behind)
        if seconds < self._timeout:
            return None
        # A phase may hold both the work and the reduction after it: who is in the reduction waits for who works.
        working = [rank for rank in behind if places[rank].function not in _WAITS] or behind
        return working[0], _sentence(working, places, seconds)


def _sentence(hanging: list[int], places: dict[int, Whereabouts], seconds: float) -> str:
    rank = hanging[0]
    place = places[rank]
    where = f"{place.phase} (in {place.function}, {place.line})" if place.function else place.phase
    if len(hanging) == len(places):
        return (
            f"no rank has finished step {place.finished + 1}: all of them have been at the same point for "
            f"{seconds:.0f} seconds, {where}."
        )
    other = next(other for number, other in places.items() if number not in hanging)
    waits = f"{other.phase}, in {other.function}" if other.function else other.phase
    return (
        f"rank {rank} ({place.host}) has not finished step {place.finished + 1}: for {seconds:.0f} seconds its last "
        f"phase has been: {where}. The others wait for it ({waits})."
    )


class Watchdog:
    """Watches one of `world_size` processes within its `with` block, by what they say in `store`.

    `fail` ends this process with the error, from a thread, and is told whether this is the one that speaks. `folder`
    receives `rank-N.txt`, where the Python threads stood, and NCCL's record of the last collectives where there is one.
    A process that holds the interpreter's lock while it hangs cannot say anything: its threads are written by
    `faulthandler`, which needs no lock.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        folder: Path,
        fail: Callable[[StokerError, bool], None],
        interval_seconds: float | None = None,
    ) -> None:
        self._store = store
        self._rank, self._world_size = rank, world_size
        self._timeout = timeout_seconds
        self._interval = interval_seconds or min(5.0, timeout_seconds / 8)
        self._folder, self._fail = folder, fail
        self._judge = Judge(timeout_seconds)
        self._place = Whereabouts(0, 0, "starting", socket.gethostname())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._stacks: Any = None

    def at(self, phase: str, finished: int) -> None:
        """Says that this process has finished so many steps and begins `phase`: a few words, as "reading data"."""
        before = self._place
        number = before.number + 1 if finished == before.finished else 0
        self._place = Whereabouts(finished, number, phase, before.host)

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._file.open("w", encoding="utf-8")
        # A connection of its own: in the main one a blocking call keeps all others waiting.
        self._store = cast("Any", self._store).clone()
        self._store.set_timeout(timedelta(seconds=max(self._timeout, 1.0)))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if not self._file.stat().st_size:
            self._file.unlink()
        with suppress(OSError):  # The other processes' files are still there; the last to leave removes the folder.
            self._folder.rmdir()

    @property
    def _file(self) -> Path:
        return self._folder / f"rank-{self._rank}.txt"

    def _run(self) -> None:
        unheard = time.monotonic()
        while not self._stopped.wait(self._interval):
            faulthandler.dump_traceback_later(max(self._timeout - self._interval, self._interval), file=self._stacks)
            now = time.monotonic()
            try:
                verdict = self._look(now)
                unheard = now
            except RuntimeError as error:  # torch's errors of a store that is gone
                if self._stopped.is_set() or now - unheard < self._timeout:
                    continue
                verdict = 0, f"rank 0's machine has not answered for {now - unheard:.0f} seconds ({error})."
            if verdict is not None:
                self._end(*verdict)
                return

    def _look(self, now: float) -> tuple[int, str] | None:
        """Says where this process is; returns the verdict, if there is one."""
        self._store.set(_key(self._rank), json.dumps(asdict(replace(self._place, **_innermost()))))
        if self._store.check([_VERDICT]):
            return _read(self._store.get(_VERDICT))
        if self._rank not in _JUDGES:
            return None
        keys = [_key(rank) for rank in range(self._world_size)]
        if not self._store.check(keys):
            return None  # Not all have begun to train: loading and preparing take what they take.
        places = {rank: Whereabouts(**json.loads(value)) for rank, value in enumerate(self._store.multi_get(keys))}
        found = self._judge.look(places, now)
        if found is None:
            return None
        rank, sentence = found
        sentence += f" Where its Python threads stood: {self._folder / f'rank-{rank}.txt'}."
        # The first verdict stands, should both judges have one.
        return _read(self._store.compare_set(_VERDICT, "", f"{rank} {sentence}"))

    def _end(self, rank: int, verdict: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        _write_collectives(self._folder / f"collectives-{self._rank}.json")
        self._await_stacks_of(rank)
        error = HangError(
            verdict,
            fix="--resume goes on from the last checkpoint. If a step may take so long, raise engine.hang_timeout.",
        )
        self._fail(error, self._rank == _JUDGES[rank == _JUDGES[0]])

    def _await_stacks_of(self, rank: int) -> None:
        """Lets the process that hangs write where it stands before the end of this one has it killed."""
        with suppress(RuntimeError):
            self._store.set(f"told-{self._rank}", "1")
            deadline = time.monotonic() + 2 * self._interval
            while not self._store.check([f"told-{rank}"]) and time.monotonic() < deadline:
                time.sleep(self._interval / 10)


def _read(verdict: bytes) -> tuple[int, str]:
    rank, _, sentence = verdict.decode().partition(" ")
    return int(rank), sentence


def _innermost() -> dict[str, Any]:
    """The function and the line at which the main thread stands."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return {}
    return {"function": frame.f_code.co_name, "line": f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"}


def _key(rank: int) -> str:
    return f"place-{rank}"


def _write_collectives(path: Path) -> None:
    """Writes NCCL's flight recorder: which collectives this process had begun and which had ended."""
    if not dist.is_initialized() or "nccl" not in dist.get_backend_config():
        return

    def write() -> None:
        from torch._C import _distributed_c10d as c10d

        with suppress(RuntimeError, OSError):  # It is there to help; the error that is being told must not be lost.
            path.write_bytes(cast("Any", c10d)._dump_fr_trace_json(includeCollectives=True, onlyActive=False))

    # In a thread that nobody waits for long: where the GPU hangs, asking it may hang too.
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_DUMP_SECONDS)


def record_collectives(prefix: Path) -> None:
    """Lets NCCL write its record of collectives to `prefix` and the rank's number, should one of them time out."""
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(prefix))
