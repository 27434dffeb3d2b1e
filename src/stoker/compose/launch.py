"""Starts the processes of a run on this machine through torch's elastic agent, and says how to start more machines."""

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from stoker.errors import HangError, StokerError, TrainingError, UserError

# What gloo and NCCL say of a connection whose other end has died.
_PEER_DIED = ("gloo/transport", "remote process exited", "DistNetworkError")

_COUNT, _MOST = "STOKER_RESTART_COUNT", "STOKER_MAX_RESTARTS"
"""What `start` tells its processes of restarts, which it counts itself; under torchrun the agent does."""

_INTERRUPTED = "STOKER_INTERRUPTED"
"""Names the folder in which a process that a signal has stopped says so: it ends as one that is done."""

_HEARD = (signal.SIGINT, signal.SIGTERM)


def run_id() -> str | None:
    """Returns the name that all starts of the run's processes share; None where no agent started them."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _restart_count() -> tuple[int, int]:
    """How often the processes were started again, and how often they may be."""
    names = (_COUNT, _MOST) if is_worker() else ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    count, most = (int(os.environ.get(name, "0")) for name in names)
    return count, most


def is_restarted(notes: Mapping[str, Any]) -> bool:
    """Whether the processes were started again, after `notes` were written by those that were started first."""
    again = _restart_count()[0] > 0
    return again and notes.get("launch") is not None and notes.get("launch") == run_id()


def restarts() -> list[str]:
    """Returns a sentence where the processes were started again; an agent does not tell them which of them died."""
    count, most = _restart_count()
    return [f"A process died, so all were started again ({count} of {most} restarts)."] if count else []


def restarts_in_vain() -> str:
    """Returns a sentence where the agent of another launcher starts a process again that ends by a mistake, or "".

    torchrun takes no exit code for a reason to stop, nor anything else that its processes could say.
    """
    count, most = (0, 0) if is_worker() else _restart_count()
    if count >= most:
        return ""
    left = f"{most - count} of {most} restarts are left"
    return (
        f"The launcher starts all processes again ({left}), which cannot mend this: stop it (Ctrl-C) and mend it first."
    )


def is_worker() -> bool:
    """Whether `start` started this process."""
    return os.environ.get("STOKER_LAUNCHED") == "1"


def is_inside_another() -> bool:
    """Whether an outer launcher (torchrun, Slurm, accelerate) has started this process beside others."""
    from stoker.compose.parallel import find_place

    return find_place() is not None


@contextmanager
def recorded() -> Iterator[None]:
    """Within it an error is left for the agent's process to tell, which prints the first one of all ranks."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the agent's process tells it
        get_error_handler().record_exception(error)
        end(error.exit_code if isinstance(error, StokerError) else 1)


def end(code: int) -> NoReturn:
    """Ends this process, one of several that have trained together, with `code`, after its exit hooks."""
    from stoker.distributed.ranks import end_process

    end_process(code)


def tell_interrupted(by: str) -> None:
    """Tells the agent's process that the signal `by` ("" for none) reached this one; it may have reached no other."""
    if by and (folder := os.environ.get(_INTERRUPTED)):
        Path(folder, os.environ["RANK"]).write_text(f"{by} {os.getpid()}", encoding="utf-8")


def fail(error: StokerError, speaks: bool) -> None:
    """Ends this process with `error`, from any thread and wherever the main one hangs; one of them `speaks`."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    if speaks and not is_worker():  # Nobody else tells it.
        os.write(2, f"error: {error}\n".encode())
    os._exit(error.exit_code)


def start(arguments: Sequence[str], *, num_processes: int, max_restarts: int = 0) -> int:
    """Runs `stoker` with `arguments` in so many processes on this machine; returns the exit code of the run.

    SIGINT and SIGTERM go on to every process, which save and end. When one dies the others are killed and, up to
    `max_restarts` times, all are started again and go on from the last checkpoint; not after a mistake of the user,
    which the next start would find again.

    Raises:
        TrainingError: a process failed, or a signal to it alone stopped the run; the message names its rank and what it
            died of, and has its exit code.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["STOKER_LAUNCHED"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # the agent would do so whatever the processes died of
        monitor_interval=0.2,
        signals_to_handle="SIGHUP",  # the others are ours: the agent would give the processes only half a minute
    )
    with _forwarded() as heard, tempfile.TemporaryDirectory(prefix="stoker-") as folder:
        os.environ[_INTERRUPTED] = folder
        for count in range(max_restarts + 1):
            os.environ[_COUNT], os.environ[_MOST] = str(count), str(max_restarts)
            try:
                elastic_launch(config, sys.executable)("-m", "stoker.cli.main", *arguments)
                break
            except ChildFailedError as error:
                if heard or _interruption(folder, num_processes):
                    break
                ours = _as_ours(error, num_processes)
                if count == max_restarts or ours.exit_code == UserError.exit_code:
                    raise ours from None
        if not heard and (interruption := _interruption(folder, num_processes)):
            raise interruption
    return 128 + heard[0] if heard else 0


def _interruption(folder: str, num_processes: int) -> TrainingError | None:
    """The error that tells which processes `tell_interrupted` in the folder; None if none did."""
    told = {int(file.name): file.read_text(encoding="utf-8").split() for file in Path(folder).iterdir()}
    if not told:
        return None
    rank = min(told)
    name, process = told[rank]
    error = TrainingError(
        f"rank {rank} of {num_processes} (process {process}) was interrupted by {name}, so all saved and ended.",
        fix="--resume goes on from there.",
    )
    error.exit_code = 128 + signal.Signals[name].value
    return error


@contextmanager
def _forwarded() -> Iterator[list[int]]:
    """Within it signals go on to the processes that this one has started; yields those that came."""
    import psutil

    heard: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _HEARD}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cause(error: Any) -> tuple[int, Any]:
    """The rank and the failure that the others come from: an agent knows their times to the second only."""

    def key(item: tuple[int, Any]) -> tuple[int, int, int]:
        rank, failure = item
        text = failure.message["message"] if isinstance(failure.message, dict) else ""
        kind = text.partition(": ")[0]
        # A process whose peer died finds its connection closed, or is ended by the agent; one that hung is named by all
        # who waited for it.
        follows = any(words in text for words in _PEER_DIED) or failure.exitcode == -signal.SIGTERM
        weight = 0 if kind == HangError.__name__ else 2 if follows else 1
        return weight, failure.timestamp, rank

    return min(error.failures.items(), key=key)


def _as_ours(error: Any, num_processes: int) -> StokerError:
    """The first failure of the agent's report, as an error with the exit code of its process."""
    rank, failure = _cause(error)
    message = failure.message
    if isinstance(message, dict):
        kind, _, text = message["message"].partition(": ")
        if kind == HangError.__name__:  # It names the process; that which told it first only waited.
            return HangError(text)
        is_ours = failure.exitcode == 2 or kind in ("TrainingError", "CheckpointError")
        # A checkpoint that cannot be written is told with its rank, which is told below.
        what = (
            text.removeprefix(f"rank {rank} of {num_processes}: ") if is_ours else message["extraInfo"]["py_callstack"]
        )
        if failure.exitcode == 2:
            return UserError(what)
    elif failure.exitcode < 0:
        what = f"it was killed by {signal.Signals(-failure.exitcode).name}."
    elif failure.exitcode == 128 + signal.SIGINT:  # before training, when nothing could be saved
        what = "it was interrupted by SIGINT."
    else:
        what = f"it ended with exit code {failure.exitcode}."
    ours = TrainingError(
        f"rank {rank} of {num_processes} (process {failure.pid}) failed, so all were ended: {what}",
        fix="--resume goes on from the last checkpoint; --max-restarts does so by itself."
        if failure.exitcode < 0
        else None,
    )
    ours.exit_code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return ours
