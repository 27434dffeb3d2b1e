"""Files that are on the disk when they are said to be: hashed while written, flushed, folders flushed too."""

import hashlib
import os
from pathlib import Path
from types import TracebackType

_PIECE_BYTES = 16 * 1024 * 1024


class DurableFile:
    """A new file at `path`, hashed while it is written; leaving the `with` block flushes it to the disk."""

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)

    def write(self, data: bytes | memoryview) -> None:
        """Appends `data`, all of it: the system may take only a part at a time."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._hash.update(piece)
            while piece:
                piece = piece[os.write(self._descriptor, piece) :]
        self.num_bytes += len(view)

    @property
    def sha256(self) -> str:
        """Hash of what has been written, in hexadecimal."""
        return self._hash.hexdigest()

    def __enter__(self) -> "DurableFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes the names in `folder`, so that a rename or a new file survives a power cut."""
    if os.name == "nt":
        return  # Windows has no such call: it flushes names by itself.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Returns the hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
