"""Rows of local files, folders, globs and Hub datasets, each with its place."""

import difflib
import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.data.readers import FILE_TYPES, Row, file_type_of, read_file
from stoker.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LIBRARY_FILES = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}


@dataclass(frozen=True)
class Source:
    """Where rows come from, found but not yet read: local files, or a dataset of the Hub."""

    path: str
    files: tuple[Path, ...] = ()
    split: str = "train"
    name: str | None = None
    file_type: str | None = None

    def rows(self) -> Iterator[Row]:
        """Yields the rows in order; a malformed one has its `error`."""
        if not self.files:
            yield from _read_hub(self.path, self.split, self.name)[1]
        for file in self.files:
            yield from read_file(file, file_type=self.file_type)

    def fingerprint(self) -> str:
        """Returns a hash that changes when the rows do: of the files' bytes, or the Hub dataset's own fingerprint."""
        if not self.files:
            return _read_hub(self.path, self.split, self.name)[0]
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as opened:
                total.update(
                    f"{file.name}\0{self.file_type}\0".encode() + hashlib.file_digest(opened, "sha256").digest()
                )
        return total.hexdigest()


def find(path: str, *, split: str = "train", name: str | None = None, file_type: str | None = None) -> Source:
    """Returns the source that `path` names: a file, a folder, a glob pattern, or a Hub id.

    Raises DataError if nothing is there, saying what is there instead.
    """
    if file_type is not None and file_type not in FILE_TYPES:
        raise DataError(
            f"file_type = {file_type!r} is not known.", where=path, fix=f"Use one of {', '.join(FILE_TYPES)}."
        )
    if "://" in path:
        raise DataError(
            f"{path!r} is a URL, which is not read directly.",
            fix="Download the file and give its path, or use a Hub id.",
        )
    local = Path(path).expanduser()
    if local.is_file():
        return Source(path, (local,), file_type=file_type)
    if local.is_dir():
        return Source(path, _files_of(local, split, file_type), file_type=file_type)
    if glob.has_magic(path):
        # Path.glob takes no pattern that begins at the root.
        found = glob.glob(str(local), recursive=True)  # noqa: PTH207
        files = tuple(sorted(file for file in map(Path, found) if file.is_file()))
        if not files:
            raise DataError(f"no file matches {path!r}.", fix=_what_is_there(local))
        return Source(path, files, file_type=file_type)
    if _looks_like_hub_id(path):
        return Source(path, split=split, name=name)
    raise DataError(f"data file {path!r} does not exist.", fix=_what_is_there(local))


def read_rows(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    file_type: str | None = None,
) -> Iterator[Row]:
    """Yields the first `limit` rows (all for None) of what `path` names. Raises DataError as `find` does."""
    source = find(path, split=split, name=name, file_type=file_type)
    yield from itertools.islice(source.rows(), limit)


def rows_from_list(rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Yields rows that are in memory already, with the place `row N`, counted from 1."""
    for number, value in enumerate(rows, start=1):
        if isinstance(value, Mapping):
            yield Row(dict(value), f"row {number}")
        else:
            yield Row({}, f"row {number}", f"the row is {type(value).__name__}, not an object with fields.")


def fingerprint_of_list(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a hash of rows that are in memory."""
    text = json.dumps(list(rows), ensure_ascii=False, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _looks_like_hub_id(path: str) -> bool:
    """`owner/name`; a bare name with a file's suffix is a missing file, not an id."""
    return _HUB_ID.fullmatch(path) is not None and "/" in path and Path(path).suffix.lstrip(".") not in FILE_TYPES


def _files_of(folder: Path, split: str, file_type: str | None) -> tuple[Path, ...]:
    """Returns the data files beneath a folder, in the order of their paths; of its `split` folder if it has one."""
    top = folder / split if (folder / split).is_dir() else folder
    files = tuple(
        file
        for file in sorted(top.rglob("*"))
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(top).parts)
        and file.name not in _LIBRARY_FILES
        and file.stem.upper() not in {"README", "LICENSE"}
        and (file_type is not None or file_type_of(file) is not None)
    )
    if not files:
        raise DataError(
            f"folder {str(top)!r} holds no data file.",
            fix=f"{_what_is_there(top / '*')} Known suffixes: {', '.join(FILE_TYPES)}.",
        )
    return files


def _what_is_there(missing: Path) -> str:
    """Says what stands in the nearest folder that exists, most alike first."""
    folder = missing.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    alike = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.6)
    if alike:
        return f"Did you mean {' or '.join(str(folder / name) for name in alike)}?"
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"Folder {str(folder)!r} holds: {listed or 'nothing'}."


def _read_hub(path: str, split: str, name: str | None) -> tuple[str, Iterator[Row]]:
    """Returns the fingerprint and rows of a Hub dataset, through its library's own cache."""
    import datasets

    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(
            f"dataset {path!r} (split {split!r}) cannot be loaded: {reason}",
            fix="Check the id, the split and the connection (HF_HUB_OFFLINE allows only what is downloaded already), "
            "or give a local file.",
        ) from error
    rows = (Row(dict(value), f"{path}[{split}]:{number}") for number, value in enumerate(dataset, start=1))
    return dataset._fingerprint, rows
