"""A model's folder that appears whole or not at all, and a look at the disk before anything is written."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stoker.checkpoint.durable import sync_folder
from stoker.errors import OutputError

_OTHER = "Free space there, or name a folder on another disk."
_SPARE_BYTES = 1 << 24
"""For the tokenizer's files, configuration and headers."""


def refuse_occupied(out: Path) -> None:
    """Raises OutputError where `out` is a file, or a folder that holds something."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError("it exists and is not a folder.", where=str(out), fix="Name a new folder.")
    if next(out.iterdir(), None) is not None:
        raise OutputError(
            "it exists and is not an empty folder.", where=str(out), fix="Name a new folder, or remove this one first."
        )


@contextmanager
def new_folder(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Within it there is a hidden empty folder beside `out`, which becomes `out` at the end.

    On any error or interrupt it is removed; what a killed process left is removed by the next that writes to `out`.
    Raises OutputError, before anything is written, when `out` holds something, another process writes to it, or fewer
    than `needed_bytes` fit there; and when writing fails.
    """
    refuse_occupied(out)
    aside, lock = out.parent / f".{out.name}.part", FileLock(out.parent / f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            "another process is writing it.", where=str(out), fix="Wait for it, or name another folder."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise _cannot(out, error) from error
    try:
        shutil.rmtree(aside, ignore_errors=True)
        _require_room(out, needed_bytes)
        aside.mkdir()
        yield aside
        sync_folder(aside)
        if out.is_dir():
            out.rmdir()
        aside.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise _cannot(out, error) from error
    except OutputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise _cannot(out, error.__cause__) from error  # it names the hidden folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _require_room(out: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes + _SPARE_BYTES:
        raise OutputError(
            f"it takes {_size(needed_bytes)}, and {_size(free)} are free there. Nothing was written.",
            where=str(out),
            fix=_OTHER,
        )


def _cannot(out: Path, error: Exception) -> OutputError:
    said = getattr(error, "strerror", None) or error
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = _OTHER if is_full else "Name another folder."
    return OutputError(f"it cannot be written: {said}. Nothing was kept.", where=str(out), fix=fix)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
