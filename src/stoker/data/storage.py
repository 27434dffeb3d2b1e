"""Files wherever they lie: on this disk or behind a URL that fsspec knows (`s3://`, `gs://`, `https://`, ...)."""

import gzip
import hashlib
import io
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from stoker.errors import DataError

# What changes when a remote file does, as the file systems call it.
_STATES = (
    "ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "last_modified", "VersionId", "mtime",
    "modified", "updated", "created", "md5Hash", "md5", "crc32c", "generation", "checksum", "sha256", "blob_id", "lfs",
)  # fmt: skip
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
             "az": "adlfs", "abfs": "adlfs"}  # fmt: skip
_SEQUENTIAL = ("http", "https")
_BUFFER_BYTES = 1 << 20
_NANOSECONDS = 1_000_000_000


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a path on this disk."""
    return "://" in location


def cores() -> tuple[int, ...]:
    """Returns the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def file_system(url: str) -> Any:
    """Returns the fsspec file system of a URL. Raises DataError if nothing here speaks its protocol."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(protocol)
        fix = f"Install {package}: pip install {package}." if package else "Download the file and give its path."
        raise DataError(f"{protocol}:// cannot be read here: {error}", where=url, fix=fix) from error


@contextmanager
def opened(location: str, *, seekable: bool = False, start: int = 0) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed if its name ends in `.gz` or `.zst`.

    `start` skips that many (decompressed) bytes, at once where the file can seek. With `seekable`, a file that cannot
    is copied to a temporary one. Raises DataError naming the file if it cannot be read.
    """
    with reading(location), _raw(location) as raw, _decompressed(raw, location) as plain:
        if seekable and (plain is not raw or not _can_seek(raw)):
            with tempfile.TemporaryFile() as copy:
                while block := plain.read(_BUFFER_BYTES):
                    copy.write(block)
                copy.seek(start)
                yield copy
            return
        if start and plain is raw and _can_seek(raw):
            plain.seek(start)
        else:
            _skip(plain, start)
        yield plain


@contextmanager
def reading(location: str) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a DataError that names it."""
    try:
        yield
    except _failures() as error:
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise DataError(f"the file cannot be read: {reason}.", where=location) from error


def state(location: str) -> str | None:
    """Returns what changes when a file does, without reading it; None if nothing tells."""
    if not is_url(location):
        found = Path(location).stat()
        return f"{found.st_size} {found.st_mtime_ns}"
    with reading(location):
        info = file_system(location).info(location)
    known = {name: str(info[name]) for name in _STATES if info.get(name)}
    return f"{info.get('size')} {known}" if known else None


def is_settled(location: str) -> bool:
    """Whether a local file was last written long enough ago for its time to tell whether it is written again."""
    return time.time_ns() - Path(location).stat().st_mtime_ns > 2 * _NANOSECONDS


def digest(location: str) -> str:
    """Returns the SHA-256 of a file's bytes as they are stored."""
    total = hashlib.sha256()
    with reading(location), _raw(location) as raw:
        while block := raw.read(_BUFFER_BYTES):
            total.update(block)
    return total.hexdigest()


def size(location: str) -> int | None:
    """Returns the bytes of a file as stored, None if its place does not tell."""
    if not is_url(location):
        return Path(location).stat().st_size
    with reading(location):
        return file_system(location).info(location).get("size")


def files_at(url: str) -> tuple[str, ...]:
    """Returns the files that a URL names: itself, those beneath a folder, or those that a glob matches, sorted.

    Raises DataError if there are none.
    """
    protocol = url.partition("://")[0]
    system = file_system(url)
    if protocol in _SEQUENTIAL:  # a `?` of theirs is a query, and servers list no folders
        return (url,)
    with reading(url):
        if any(sign in url for sign in "*?["):
            found = system.glob(url)
        elif system.isdir(url):
            found = system.find(url)
        else:
            found = [url] if system.exists(url) else []
    if not found:
        raise DataError(f"there is no file at {url!r}.", fix="Check the address and the rights to read it.")
    return tuple(sorted(name if is_url(name) else system.unstrip_protocol(name) for name in found))


@contextmanager
def _raw(location: str) -> Iterator[BinaryIO]:
    if not is_url(location):
        with Path(location).open("rb") as raw:
            yield raw
        return
    system = file_system(location)
    # Servers need not know range requests; in one go any of them can be read.
    options = {"block_size": 0} if location.startswith(_SEQUENTIAL) else {"block_size": 8 * _BUFFER_BYTES}
    with system.open(location, "rb", **options) as raw:
        # Their own iteration over lines is slow, and HTTP's claims that it can seek.
        yield io.BufferedReader(_Sequential(raw) if location.startswith(_SEQUENTIAL) else raw, _BUFFER_BYTES)


class _Sequential(io.RawIOBase):
    """A file-like object that can only be read on, as a raw stream for a buffer on top."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._inner.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def _decompressed(raw: BinaryIO, location: str) -> Iterator[BinaryIO]:
    ending = location.partition("?")[0].rpartition(".")[2].lower() if is_url(location) else Path(location).suffix[1:]
    if ending == "gz":
        with gzip.open(raw, "rb") as plain:
            yield plain  # type: ignore[misc]
    elif ending in ("zst", "zstd"):
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd") as stream:
            yield io.BufferedReader(stream, _BUFFER_BYTES)  # type: ignore[arg-type]
    else:
        yield raw


def _can_seek(raw: BinaryIO) -> bool:
    return bool(getattr(raw, "seekable", lambda: False)())


def _skip(plain: BinaryIO, count: int) -> None:
    while count > 0 and (block := plain.read(min(count, _BUFFER_BYTES))):
        count -= len(block)


def _failures() -> tuple[type[Exception], ...]:
    """What file systems raise: OSError, and what damaged archives and HTTP clients have of their own."""
    failures: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        import aiohttp
    except ImportError:
        return failures
    return (*failures, aiohttp.ClientError)
