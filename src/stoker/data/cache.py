"""Prepared data kept on disk under a key made of everything that shapes it.

A folder `<cache>/<key>` holds arrays and a manifest with their sizes and hashes (`stoker.data.writers` makes it). It is
written aside and renamed, so it is there whole or not at all; one whose bytes do not match its manifest is made anew.
Whoever prepares holds the file lock `<cache>/.locks/<key>`; the others wait for it and then find the folder. The system
releases the lock of a process that dies.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stoker.data import storage
from stoker.data.audit import Audit
from stoker.data.prepared import Prepared
from stoker.data.writers import ARRAYS, MANIFEST, VERSION, mapped, replace_text
from stoker.errors import OutputError

ALWAYS_HASHED_BYTES = 64 << 20
"""Files up to this size are hashed each time they are opened; larger ones only if their time of writing has changed."""
_WAIT_SECONDS = 0.5
_DIGESTS = "digests.json"
_MEMO_BYTES = 1 << 20


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
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not set(ARRAYS) <= set(manifest["files"]):
            raise DamagedError("its manifest names no arrays")
        for name, expected in manifest["files"].items():
            _check(folder / name, expected)
        audit = Audit.from_dict(manifest["audit"])
        found = mapped(folder, manifest, audit, cached=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"it cannot be read ({error!r})") from error
    with suppress(OSError):  # a cache that may only be read keeps no record of its use
        os.utime(folder / MANIFEST)
    return found


def _check(path: Path, expected: Mapping[str, Any]) -> None:
    found = path.stat()
    if found.st_size != expected["bytes"]:
        raise DamagedError(f"{path.name} has {found.st_size:,} bytes instead of {expected['bytes']:,}")
    if found.st_size > ALWAYS_HASHED_BYTES and found.st_mtime_ns == expected["modified_ns"]:
        return
    if storage.digest(str(path)) != expected["sha256"]:
        raise DamagedError(f"{path.name} was altered")


@contextmanager
def locked(folder: Path, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a folder that is to be made; `on_wait` is called every half second while another process
    holds it.

    Raises OutputError if the cache cannot be written to.
    """
    try:
        lock_of(folder).parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_of(folder))
        timeout = 0.0
        while not lock.is_locked:
            try:
                lock.acquire(timeout=timeout)
            except Timeout:
                on_wait()
                timeout = _WAIT_SECONDS
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"prepared data cannot be written to {str(folder.parent)!r}: {reason}.",
            fix="Set data.cache_folder to another place.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def lock_of(folder: Path) -> Path:
    """Returns the file whose lock whoever makes `folder` holds."""
    return folder.parent / ".locks" / folder.name


class Digests:
    """Hashes of files, remembered in the cache so that an unchanged file is not read again only to know it.

    A file counts as unchanged while its size and its time of writing are (for URLs: what their server says of them). A
    file of up to a mebibyte, or written within the last two seconds, is read anyway.
    """

    def __init__(self, cache_folder: Path | None) -> None:
        self._path = None if cache_folder is None else cache_folder / _DIGESTS
        self._known: dict[str, list[str]] = {}
        if self._path is not None:
            with suppress(OSError, ValueError):  # it only saves time
                self._known = json.loads(self._path.read_text(encoding="utf-8"))

    def __call__(self, location: str) -> str:
        """Returns a hash of the file's content, or of what its server says of it."""
        if storage.is_url(location):
            return storage.state(location) or storage.digest(location)
        with storage.reading(location):
            state, size = storage.state(location) or "", storage.size(location) or 0
            place = str(Path(location).resolve())
            is_sure = size > _MEMO_BYTES and storage.is_settled(location)
        known = self._known.get(place)
        if is_sure and known is not None and known[0] == state:
            return known[1]
        digest = storage.digest(location)
        if is_sure and self._path is not None:
            self._known[place] = [state, digest]
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(self._path, json.dumps(self._known))
        return digest
