"""Prepared data kept on disk under a key made of everything that shapes it.

A folder `<cache>/<key>` holds three arrays and a manifest with their hashes. It is written aside and renamed, so it is
there whole or not at all; one whose bytes do not match its manifest is made anew.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np

from stoker.data.audit import Audit
from stoker.data.prepared import Prepared
from stoker.errors import OutputError

VERSION = 1
"""Raised whenever the same input would give other arrays or counts."""

_ARRAYS = {"ids": np.uint32, "trained": np.bool_, "offsets": np.int64}
_MANIFEST = "manifest.json"


def key(parts: Mapping[str, Any]) -> str:
    """Returns a short name for prepared data: the hash of all that shapes it."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Returns a hash of a fast tokenizer: vocabulary, merges, normaliser, post-processor, special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with padding or truncation leave their settings behind; preparing uses neither.
    state.pop("padding", None)
    state.pop("truncation", None)
    text = json.dumps([state, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that render and tokenise; an upgrade may change what they give."""
    return {name: version(name) for name in ("transformers", "tokenizers", "Jinja2")}


class DamagedError(Exception):
    """A cached folder is incomplete or altered; the message says how."""


def load(folder: Path) -> Prepared | None:
    """Returns the prepared data in `folder`, mapped into memory; None if there is no such folder.

    Raises DamagedError if it is not what was written.
    """
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        expected = {name: manifest["files"][name] for name in _ARRAYS}
        audit = Audit.from_dict(manifest["audit"])
        for name, digest in expected.items():
            with (folder / name).open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                    raise DamagedError(f"{name} was altered or cut short")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"it cannot be read ({error!r})") from error
    return _mapped(folder, audit, cached=True)


def _mapped(folder: Path, audit: Audit, *, cached: bool) -> Prepared:
    ids, trained, offsets = (
        np.memmap(folder / name, dtype=dtype, mode="r") if (folder / name).stat().st_size else np.empty(0, dtype=dtype)
        for name, dtype in _ARRAYS.items()
    )
    return Prepared(ids, trained, offsets, audit, cached=cached)


class Writer(Protocol):
    """Takes documents one by one."""

    def add(self, ids: np.ndarray, trained: np.ndarray) -> None:
        """Appends a document."""
        ...


class MemoryWriter:
    """Collects documents in memory."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._lengths: list[int] = []

    def __enter__(self) -> "MemoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add(self, ids: np.ndarray, trained: np.ndarray) -> None:
        """Appends a document."""
        self._ids.append(ids)
        self._trained.append(trained)
        self._lengths.append(len(ids))

    def finish(self, audit: Audit) -> Prepared:
        """Returns everything that was added."""
        return Prepared(
            ids=np.concatenate([np.empty(0, dtype=np.uint32), *self._ids]),
            trained=np.concatenate([np.empty(0, dtype=np.bool_), *self._trained]),
            offsets=_offsets(self._lengths),
            audit=audit,
        )


class FolderWriter:
    """Writes documents beside the folder they will stand in; `finish` hashes, flushes and renames.

    Left without `finish`, it removes what it wrote. Raises OutputError if the disk does not take it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        self._lengths: list[int] = []
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "FolderWriter":
        try:
            self._aside.mkdir(parents=True)
            for name in ("ids", "trained"):
                self._files[name] = (self._aside / name).open("wb")
        except OSError as error:
            self._discard()
            raise _unwritable(self._folder, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._discard()

    def add(self, ids: np.ndarray, trained: np.ndarray) -> None:
        """Appends a document."""
        try:
            self._files["ids"].write(ids.astype(np.uint32, copy=False).tobytes())
            self._files["trained"].write(trained.astype(np.bool_, copy=False).tobytes())
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        self._lengths.append(len(ids))

    def finish(self, audit: Audit) -> Prepared:
        """Puts the folder in its place and returns it mapped into memory."""
        try:
            for opened in self._files.values():
                opened.flush()
                os.fsync(opened.fileno())
                opened.close()
            (self._aside / "offsets").write_bytes(_offsets(self._lengths).tobytes())
            files = {name: _digest(self._aside / name) for name in _ARRAYS}
            manifest = json.dumps({"version": VERSION, "files": files, "audit": audit.to_dict()}, indent=1)
            (self._aside / _MANIFEST).write_text(manifest, encoding="utf-8")
            shutil.rmtree(self._folder, ignore_errors=True)
            self._aside.rename(self._folder)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        return _mapped(self._folder, audit, cached=False)

    def _discard(self) -> None:
        for opened in self._files.values():
            try:
                opened.close()
            except OSError:  # what is still buffered does not fit on the disk either; it is thrown away anyway
                continue
        shutil.rmtree(self._aside, ignore_errors=True)


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"prepared data cannot be written to {str(folder.parent)!r}: {error.strerror or error}.",
        fix="Free some space or set data.cache_folder to another place.",
    )
