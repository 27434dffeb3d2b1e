"""What the cache of prepared data holds, what of it is stale and why, and removing that."""

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stoker.data import storage
from stoker.data.cache import library_versions, lock_of
from stoker.data.writers import MANIFEST, PARTIAL, VERSION
from stoker.errors import DataError

_DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Entry:
    """One prepared dataset: its folder, bytes on disk, seconds since it was made and since it was last used.

    `sources` are the places it was made from; `stale` says why it will not be used again, empty if it may be.
    `documents` and `tokens` are 0 where no manifest tells.
    """

    folder: Path
    num_bytes: int
    age_seconds: float
    unused_seconds: float
    sources: tuple[str, ...]
    documents: int
    tokens: int
    stale: str

    @property
    def key(self) -> str:
        """The folder's name."""
        return self.folder.name


def entries(cache_folder: Path) -> list[Entry]:
    """Returns everything in the cache, last used first; what is being written now is left out."""
    if not cache_folder.is_dir():
        return []
    found = [_entry(folder) for folder in cache_folder.iterdir() if _is_ours(folder) and not _is_in_use(folder)]
    return sorted(found, key=lambda entry: entry.unused_seconds)


def prune(cache_folder: Path, *, unused_days: float | None = None) -> list[Entry]:
    """Removes what is stale, and what was not used for so many days, and returns it."""
    removed = [
        entry
        for entry in entries(cache_folder)
        if entry.stale or (unused_days is not None and entry.unused_seconds > unused_days * _DAY_SECONDS)
    ]
    for entry in removed:
        with FileLock(lock_of(_whole(entry.folder))):
            shutil.rmtree(
                entry.folder
            )  # the lock's file stays: removing it under a waiting process would free it twice
    return removed


def _entry(folder: Path) -> Entry:
    now = time.time()
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    try:
        path = folder / MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        used = path.stat().st_mtime
        made_from = manifest.get("made_from", {})
        created = float(manifest.get("created", used))
        audit = manifest.get("audit", {})
        sources = tuple(source["label"] for source in made_from.get("sources", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        age = now - folder.stat().st_mtime
        why = "its preparation was cut off" if folder.name.endswith(PARTIAL) else "it cannot be read"
        return Entry(folder, num_bytes, age, age, (), 0, 0, why)
    stale = _why_stale(manifest, made_from)
    documents, tokens = audit.get("documents", 0), audit.get("tokens", 0)
    return Entry(folder, num_bytes, now - created, now - used, sources, documents, tokens, stale)


def _why_stale(manifest: dict[str, Any], made_from: dict[str, Any]) -> str:
    if manifest.get("version") != VERSION:
        return f"its layout is version {manifest.get('version')}, this Stoker's is {VERSION}"
    now = library_versions()
    for name, before in made_from.get("libraries", {}).items():
        if now.get(name) != before:
            return f"made with {name} {before}, now {now.get(name)}"
    return next(_changes(made_from.get("sources", ())), "")


def _changes(sources: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yields which local files are not what they were; addresses are left alone, since asking takes a network."""
    for source in sources:
        for file, before in source.get("files", {}).items():
            if storage.is_url(file):
                continue
            try:
                state = storage.state(file)
            except OSError:
                yield f"{file} is gone"
                continue
            # A file that was only copied or touched still has its content.
            if state != before["state"] and storage.digest(file) != before["digest"]:
                yield f"{file} has changed"


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and re.fullmatch(r"[0-9a-f]{32}", _whole(folder).name) is not None


def _whole(folder: Path) -> Path:
    """Returns the folder that a partial one was to become."""
    name = folder.name
    return folder.with_name(name[1 : -len(PARTIAL)]) if name.endswith(PARTIAL) else folder


def _is_in_use(folder: Path) -> bool:
    """Whether a process is writing it now."""
    if not folder.name.endswith(PARTIAL):
        return False
    try:
        with FileLock(lock_of(_whole(folder)), timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError) as error:
        raise DataError(f"the cache cannot be locked: {error}", where=str(folder.parent)) from error
