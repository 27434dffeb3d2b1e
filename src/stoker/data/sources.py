"""Rows of local files, folders, globs, URLs and Hub datasets, each with its place."""

import difflib
import glob
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from stoker.data import hub, storage
from stoker.data.readers import FILE_TYPES, Line, Raw, Row, file_type_of, parsed, read_raw
from stoker.data.selection import Selection, Split, read_split
from stoker.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LIBRARY_FILES = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}

Digest = Callable[[str], str]
"""From a file's place to a hash of its content."""


class Position(NamedTuple):
    """A place between two rows of a source: how many rows lie before it (`row`), the file that the next one is read
    from, and how far that file is read: rows (lines for JSONL), and bytes where rows are lines."""

    row: int = 0
    file: int = 0
    file_row: int = 0
    byte: int = 0


BEGINNING = Position()


@dataclass(frozen=True)
class Source:
    """Where rows come from, found but not yet read: files on this disk or behind URLs, or a dataset of the Hub.

    `files` are paths and URLs; without them `path` is a Hub id. `shard` of `num_shards` takes every so-manieth row.
    """

    path: str
    files: tuple[str, ...] = ()
    split: Split = field(default_factory=lambda: Split("train"))
    name: str | None = None
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    file_type: str | None = None
    limit: int | None = None
    shard: int = 0
    num_shards: int = 1

    def rows(self) -> Iterator[Row]:
        """Yields the rows in order; a malformed one has its `error`."""
        return (parsed(raw) for raw, _ in self.read())

    def read(self, at: Position = BEGINNING) -> Iterator[tuple[Raw, Position]]:
        """Yields the selected rows from a place on, each with the place after it."""
        selection, end = self.selection, self.selection.end
        for raw, position in self._everything(at):
            number = position.row - 1
            if end is not None and number >= end:
                return
            if selection.takes(number):
                yield raw, position

    @cached_property
    def selection(self) -> Selection:
        """The rows to take; counts all rows first if the slice depends on how many there are."""
        bounds: tuple[int, int | None] = (0, None)
        if self.files and not self.split.is_whole:
            total = sum(1 for _ in self._everything(BEGINNING)) if self.split.needs_total else None
            bounds = self.split.bounds(total)
        return Selection(*bounds, shard=self.shard, num_shards=self.num_shards, limit=self.limit)

    def fingerprint(self, digest: Digest = storage.digest) -> str:
        """Returns a hash that changes when the rows do: of the files' content, or the Hub dataset's own fingerprint."""
        split = (self.split.start, self.split.stop, self.limit, self.shard, self.num_shards)
        total = hashlib.sha256(repr(split).encode())
        if not self.files:
            total.update(self._hub.fingerprint.encode())
        for file in self.files:
            name = Path(file).name
            total.update(f"{name}\0{self.file_type}\0{digest(file)}\0".encode())
        return total.hexdigest()

    def num_bytes(self) -> int | None:
        """Returns how many bytes the files have as stored, the Hub's table in memory; None if that is not known."""
        if not self.files:
            return int(self._hub.content.data.nbytes)
        return sum(self._sizes) if self._sizes else None

    def share(self, at: Position) -> float | None:
        """Returns what part of the rows lies before a place, as far as bytes or the Hub's count tell; None if not."""
        if not self.files:
            return at.row / max(1, len(self._hub.content))
        total = sum(self._sizes)
        if not total:
            return None
        file = self.files[at.file]
        is_plain = file_type_of(file) == "jsonl" and Path(file.partition("?")[0]).suffix not in (".gz", ".zst", ".zstd")
        if len(self.files) == 1 and not is_plain:
            return None
        return (sum(self._sizes[: at.file]) + (at.byte if is_plain else 0)) / total

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of each file as stored; none if one is not known."""
        sizes = [storage.size(file) for file in self.files]
        known = [size for size in sizes if size is not None]
        return known if len(known) == len(sizes) else []

    @cached_property
    def _hub(self) -> hub.Dataset:
        return hub.load(self.path, name=self.name, split=self.split, data_files=self.data_files, revision=self.revision)

    def _everything(self, at: Position) -> Iterator[tuple[Raw, Position]]:
        if not self.files:
            for number, row in enumerate(self._hub.rows(at.row), start=at.row + 1):
                yield row, Position(number, 0, number)
            return
        number, file_row, byte = at.row, at.file_row, at.byte
        for index in range(at.file, len(self.files)):
            for raw in read_raw(self.files[index], file_type=self.file_type, rows=file_row, start=byte):
                number += 1
                if isinstance(raw, Line):
                    file_row, byte = raw.number, raw.end
                else:
                    file_row += 1
                yield raw, Position(number, index, file_row, byte)
            file_row = byte = 0


def find(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    data_files: Sequence[str] = (),
    revision: str | None = None,
    file_type: str | None = None,
    limit: int | None = None,
    shard: int = 0,
    num_shards: int = 1,
    streaming: bool = False,
) -> Source:
    """Returns the source that `path` names: a file, a folder, a glob pattern, a URL, or a Hub id.

    `data_files` are files or patterns within a folder, URL or Hub dataset. `streaming` reads a Hub dataset's files
    where they are instead of fetching them all first. Raises DataError if nothing is there, saying what is there
    instead.
    """
    if file_type is not None and file_type not in FILE_TYPES:
        raise DataError(
            f"file_type = {file_type!r} is not known.", where=path, fix=f"Use one of {', '.join(FILE_TYPES)}."
        )
    if not 0 <= shard < num_shards:
        raise DataError(f"shard.index = {shard} is not below shard.num = {num_shards}.", where=path)
    options = {"file_type": file_type, "limit": limit, "shard": shard, "num_shards": num_shards}
    if _is_hub(path):
        if not streaming:
            wanted = Split(split)  # the library reads slices itself
            return Source(path, split=wanted, name=name, revision=revision, data_files=tuple(data_files), **options)
        part = read_split(split, path)
        files = hub.files(path, name=name, split=part.name, data_files=tuple(data_files), revision=revision)
        _check_types(files, path, file_type)
        return Source(path, files, part, **options)
    part = read_split(split, path)
    return Source(path, _files(path, part.name, data_files, file_type), part, **options)


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


def _is_hub(path: str) -> bool:
    local = Path(path).expanduser()
    return not storage.is_url(path) and not local.exists() and not glob.has_magic(path) and _looks_like_hub_id(path)


def _looks_like_hub_id(path: str) -> bool:
    """`owner/name`; a bare name with a file's suffix is a missing file, not an id."""
    return _HUB_ID.fullmatch(path) is not None and "/" in path and file_type_of(path) is None


def _files(path: str, split: str, data_files: Sequence[str], file_type: str | None) -> tuple[str, ...]:
    """Returns the files that a path or URL, and `data_files` within it, name."""
    if data_files:
        return tuple(
            file
            for one in data_files
            for file in _files(one if _is_rooted(one) else f"{path.rstrip('/')}/{one}", split, (), file_type)
        )
    if storage.is_url(path):
        found = storage.files_at(path)
        files = tuple(file for file in found if len(found) == 1 or _is_data(file, file_type))
        if not files:
            raise DataError(f"no data file lies at {path!r}.", fix=f"Known suffixes: {', '.join(FILE_TYPES)}.")
        return files
    local = Path(path).expanduser()
    if local.is_file():
        return (str(local),)
    if local.is_dir():
        return _files_of(local, split, file_type)
    if glob.has_magic(path):
        # Path.glob takes no pattern that begins at the root.
        matches = glob.glob(str(local), recursive=True)  # noqa: PTH207
        files = tuple(sorted(file for file in matches if Path(file).is_file()))
        if not files:
            raise DataError(f"no file matches {path!r}.", fix=_what_is_there(local))
        return files
    raise DataError(f"data file {path!r} does not exist.", fix=_what_is_there(local))


def _is_rooted(file: str) -> bool:
    return storage.is_url(file) or Path(file).expanduser().is_absolute()


def _is_data(file: str, file_type: str | None) -> bool:
    name = Path(file).name
    return (
        not name.startswith((".", "_"))
        and name not in _LIBRARY_FILES
        and Path(name).stem.upper() not in {"README", "LICENSE"}
        and (file_type is not None or file_type_of(file) is not None)
    )


def _files_of(folder: Path, split: str, file_type: str | None) -> tuple[str, ...]:
    """Returns the data files beneath a folder, in the order of their paths; of its `split` folder if it has one."""
    top = folder / split if (folder / split).is_dir() else folder
    files = tuple(
        str(file)
        for file in sorted(top.rglob("*"))
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(top).parts)
        and _is_data(str(file), file_type)
    )
    if not files:
        raise DataError(
            f"folder {str(top)!r} holds no data file.",
            fix=f"{_what_is_there(top / '*')} Known suffixes: {', '.join(FILE_TYPES)}.",
        )
    return files


def _check_types(files: Sequence[str], path: str, file_type: str | None) -> None:
    unknown = next((file for file in files if file_type is None and file_type_of(file) is None), None)
    if unknown is not None:
        raise DataError(
            f"{path} holds {unknown!r}, which cannot be streamed.",
            fix=f"Leave out data.streaming, or set file_type or data_files. Known: {', '.join(FILE_TYPES)}.",
        )


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
