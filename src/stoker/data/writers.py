"""Where prepared documents go: into memory, or into a folder that is there whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np

from stoker.data.audit import Audit
from stoker.data.prepared import Prepared
from stoker.data.tokens import Tokens
from stoker.errors import OutputError

VERSION = 2
"""Raised whenever the same input would give other arrays or counts, or the files another layout."""

ARRAYS = {"ids": np.uint32, "trained": np.bool_, "offsets": np.int64, "counts": np.uint32}
"""The files of a folder; `labels` (int8) is there if documents have labels."""
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PARTIAL = ".partial"
"""What a folder's name ends with while it is written."""

_FULL = {errno.ENOSPC, errno.EDQUOT}


class Writer(Protocol):
    """Takes documents in order."""

    def __enter__(self) -> "Writer": ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...

    def begin_source(self) -> None:
        """Says that the next documents are of another source."""
        ...

    def add(self, tokens: Tokens) -> None:
        """Appends documents."""
        ...

    def note_progress(self, share: float | None) -> None:
        """Says what share of the rows is done (None: not known)."""
        ...

    def finish(self, audit: Audit, *, documents_per_example: int = 1) -> Prepared:
        """Returns everything that was added."""
        ...


class MemoryWriter:
    """Collects documents in memory."""

    def __init__(self) -> None:
        self._parts: list[Tokens] = []
        self._num_documents = 0
        self._starts: list[int] = []

    def __enter__(self) -> "MemoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def begin_source(self) -> None:
        """Says that the next documents are of another source."""
        self._starts.append(self._num_documents)

    def add(self, tokens: Tokens) -> None:
        """Appends documents."""
        self._parts.append(tokens)
        self._num_documents += len(tokens.lengths)

    def note_progress(self, share: float | None) -> None:
        """Nobody watches."""

    def finish(self, audit: Audit, *, documents_per_example: int = 1) -> Prepared:
        """Returns everything that was added."""
        nothing = Tokens.of([])
        parts = [nothing, *self._parts]
        has_labels = any(part.labels is not None for part in parts)
        lengths = np.concatenate([part.lengths for part in parts])
        return Prepared(
            ids=np.concatenate([part.ids for part in parts]),
            trained=np.concatenate([part.trained for part in parts]),
            offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)]),
            audit=audit,
            documents_per_example=documents_per_example,
            source_starts=tuple(self._starts) or (0,),
            trained_per_document=np.concatenate([part.trained_counts for part in parts]),
            labels=np.concatenate([_labels(part) for part in parts]) if has_labels else None,
        )


class FolderWriter:
    """Writes documents beside the folder they will stand in; `finish` flushes, hashes and renames.

    Whoever uses it holds the folder's lock: what an earlier, killed writer left is removed first. Left without `finish`
    it removes what it wrote. `description` goes into the manifest. Memory does not grow with the documents. Raises
    OutputError if the disk does not take them.
    """

    def __init__(self, folder: Path, *, description: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._aside = partial_of(folder)
        self._description = dict(description or {})
        self._files: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {}
        self._num_documents = self._num_tokens = self._num_bytes = 0
        self._starts: list[int] = []
        self._share: float | None = None
        self._has_labels = False

    def __enter__(self) -> "FolderWriter":
        try:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside.mkdir(parents=True)
            for name in ARRAYS:
                self._open(name)
            self._write("offsets", np.zeros(1, dtype=np.int64))
        except OSError as error:
            self._discard()
            raise self._unwritable(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._discard()

    def begin_source(self) -> None:
        """Says that the next documents are of another source."""
        self._starts.append(self._num_documents)

    def add(self, tokens: Tokens) -> None:
        """Appends documents."""
        try:
            if tokens.labels is not None or self._has_labels:
                self._add_labels(tokens)
            self._write("ids", tokens.ids.astype(np.uint32, copy=False))
            self._write("trained", tokens.trained.astype(np.bool_, copy=False))
            self._write("offsets", self._num_tokens + np.cumsum(tokens.lengths, dtype=np.int64))
            self._write("counts", tokens.trained_counts)
        except OSError as error:
            raise self._unwritable(error) from error
        self._num_documents += len(tokens.lengths)
        self._num_tokens += len(tokens.ids)

    def note_progress(self, share: float | None) -> None:
        """Says what share of the rows is done, and lets readers see what is there: `progress.json` names how much."""
        self._share = share
        try:
            for opened in self._files.values():
                opened.flush()
            replace_text(self._aside / PROGRESS, json.dumps({"documents": self._num_documents, "starts": self._starts}))
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, audit: Audit, *, documents_per_example: int = 1) -> Prepared:
        """Puts the folder in its place and returns it mapped into memory."""
        try:
            for opened in self._files.values():
                opened.flush()
                os.fsync(opened.fileno())
                opened.close()
            (self._aside / PROGRESS).unlink(missing_ok=True)
            files = {name: _described(self._aside / name, found.hexdigest()) for name, found in self._hashes.items()}
            manifest = {
                "version": VERSION,
                "files": files,
                "documents_per_example": documents_per_example,
                "source_starts": self._starts or [0],
                "audit": audit.to_dict(),
                **self._description,
            }
            with (self._aside / MANIFEST).open("w", encoding="utf-8") as opened_text:
                opened_text.write(json.dumps(manifest, indent=1))
                opened_text.flush()
                os.fsync(opened_text.fileno())
            shutil.rmtree(self._folder, ignore_errors=True)
            self._aside.rename(self._folder)
        except OSError as error:
            raise self._unwritable(error) from error
        return mapped(self._folder, manifest, audit, cached=False)

    def _add_labels(self, tokens: Tokens) -> None:
        if not self._has_labels:
            self._open("labels")
            self._write("labels", np.full(self._num_tokens, -1, dtype=np.int8))
            self._has_labels = True
        self._write("labels", _labels(tokens))

    def _open(self, name: str) -> None:
        self._files[name] = (self._aside / name).open("wb")
        self._hashes[name] = hashlib.sha256()

    def _write(self, name: str, array: np.ndarray) -> None:
        content = np.ascontiguousarray(array).data.cast("B") if array.size else b""
        self._files[name].write(content)
        self._hashes[name].update(content)
        self._num_bytes += len(content)

    def _discard(self) -> None:
        for opened in self._files.values():
            try:
                opened.close()
            except OSError:  # what is still buffered does not fit on the disk either; it is thrown away anyway
                continue
        shutil.rmtree(self._aside, ignore_errors=True)

    def _unwritable(self, error: OSError) -> OutputError:
        place = str(self._folder.parent)
        if error.errno not in _FULL:
            return OutputError(
                f"prepared data cannot be written to {place!r}: {error.strerror or error}.",
                fix="Set data.cache_folder to a place that can be written to.",
            )
        needed = ""
        if self._share:
            whole = self._num_bytes / self._share
            needed = (
                f" That was {self._share:.0%} of the rows: about {_mebibytes(whole)} are needed, "
                f"{_mebibytes(whole - self._num_bytes)} more than there was room for."
            )
        return OutputError(
            f"prepared data cannot be written to {place!r}: {error.strerror or error}, after "
            f"{_mebibytes(self._num_bytes)}.{needed}",
            fix="Free some space (`stoker prepare --list` shows what older data takes, --prune removes what is stale), "
            "or set data.cache_folder to another place. What was written of this is removed.",
        )


def partial_of(folder: Path) -> Path:
    """Returns where a folder is written before it is whole."""
    return folder.with_name(f".{folder.name}{PARTIAL}")


def mapped(folder: Path, manifest: Mapping[str, Any], audit: Audit, *, cached: bool) -> Prepared:
    """Returns a folder's arrays mapped into memory."""
    arrays = {name: _array(folder / name, dtype) for name, dtype in ARRAYS.items()}
    return Prepared(
        arrays["ids"],
        arrays["trained"],
        arrays["offsets"],
        audit,
        cached=cached,
        documents_per_example=manifest["documents_per_example"],
        source_starts=tuple(manifest["source_starts"]),
        trained_per_document=arrays["counts"],
        labels=_array(folder / "labels", np.int8) if "labels" in manifest["files"] else None,
        folder=folder,
    )


def replace_text(path: Path, text: str) -> None:
    """Writes a small file so that a reader sees the old or the new text, never a part."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _array(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _described(path: Path, digest: str) -> dict[str, Any]:
    found = path.stat()
    return {"sha256": digest, "bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _labels(tokens: Tokens) -> np.ndarray:
    return np.full(len(tokens.ids), -1, dtype=np.int8) if tokens.labels is None else tokens.labels


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
