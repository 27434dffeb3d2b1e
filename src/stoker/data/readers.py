"""Readers of data files: each yields rows with their place, and goes on after a malformed one.

Lines of JSONL are handed out unparsed (`Line`), so that whoever has the time parses them: a worker process, as a rule.
"""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stoker.data import json_text, storage
from stoker.data.json_text import SAVE_AS_UTF8
from stoker.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row of a source, its place (`file:line`, or `file:row` for binary files), and what is wrong with it if so."""

    value: dict[str, Any]
    where: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a JSONL file that nobody has parsed yet: number `number` (from 1) of the file `name`, ending at byte
    `end` of its (decompressed) content."""

    content: bytes
    name: str
    number: int
    end: int

    @property
    def where(self) -> str:
        """The line's place."""
        return f"{self.name}:{self.number}"

    def row(self) -> Row:
        """Returns the row that the line holds, or what is wrong with it."""
        where = self.where
        try:
            text = self.content.decode("utf-8-sig" if self.number == 1 else "utf-8")
            return _object(json.loads(text.strip()), where)
        except UnicodeDecodeError as error:
            return Row({}, where, f"the line is not UTF-8 (byte {error.start + 1}). {SAVE_AS_UTF8}")
        except json.JSONDecodeError as error:
            hint = _hint(self.content)
            what = error.msg.removesuffix(" starting at")
            return Row({}, where, f"the line is not JSON: {what} at column {error.colno}.{hint}")
        except RecursionError:
            return Row({}, where, "the line is JSON nested too deeply.")


Raw = Row | Line


def parsed(raw: Raw) -> Row:
    """Returns the row, parsed if it was not yet."""
    return raw.row() if isinstance(raw, Line) else raw


def file_type_of(path: Path | str) -> str | None:
    """Returns the type that a file's suffix tells (`.gz` and `.zst` aside), None if it is not a known one."""
    name = str(path)
    suffixes = Path(name.partition("?")[0] if storage.is_url(name) else name).suffixes
    endings = [suffix.lstrip(".").lower() for suffix in suffixes]
    if endings and endings[-1] in ("gz", "zst", "zstd"):
        endings.pop()
    return _SUFFIXES.get(endings[-1]) if endings else None


def read_file(path: Path | str, *, file_type: str | None = None) -> Iterator[Row]:
    """Yields the rows of a file. Raises DataError if the file as a whole cannot be read."""
    yield from map(parsed, read_raw(str(path), file_type=file_type))


def read_raw(location: str, *, file_type: str | None = None, rows: int = 0, start: int = 0) -> Iterator[Raw]:
    """Yields the rows of a file from a place within: after `rows` rows and, where rows are lines, `start` bytes.

    Raises DataError if the file as a whole cannot be read.
    """
    kind = file_type or file_type_of(location)
    if kind is None:
        suffix = Path(location).suffix
        raise DataError(
            f"the file's suffix {suffix!r} does not tell what it holds.",
            where=location,
            fix=f"Set file_type to one of {', '.join(FILE_TYPES)}.",
        )
    if kind == "jsonl":
        with storage.opened(location, start=start) as opened:
            yield from _lines(opened, location, first=rows, start=start)
        return
    with storage.opened(location, seekable=kind in ("parquet", "arrow")) as opened:
        if kind == "parquet":
            yield from _read_parquet(opened, location, skip=rows)
        else:
            yield from itertools.islice(FILE_TYPES[kind](opened, location), rows, None)


def _lines(opened: Iterable[bytes], name: str, *, first: int, start: int) -> Iterator[Line]:
    """Yields the lines that are not blank. `first` counts all lines before `start`, as a line's number does."""
    end = start
    for number, content in enumerate(opened, start=first + 1):
        end += len(content)
        if content.strip():
            yield Line(content, name, number, end)


def _object(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return Row(value, where)
    return Row(
        {}, where, f"the row is {_JSON_NAMES.get(type(value), type(value).__name__)}, not an object with fields."
    )


def _read_jsonl(opened: BinaryIO, name: str) -> Iterator[Raw]:
    yield from _lines(opened, name, first=0, start=0)


def _hint(line: bytes) -> str:
    return " The file looks like one JSON list; name it .json." if line.strip() in (b"[", b"[{", b"{") else ""


def _read_json(opened: BinaryIO, name: str) -> Iterator[Row]:
    """A file whose first line is an object, with more lines after it, holds JSON lines under another name."""
    begin = _to_content(opened, 64)
    if begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{" and not begin.endswith(b"\n"):
        begin += opened.readline(_LONGEST_LINE)
    if begin.endswith(b"\n") and _is_object(begin):
        begin += (following := _to_content(opened))
        if following.strip():
            # Parsed here: a place within this file is told by counting rows, within JSONL by lines and bytes.
            yield from map(parsed, _lines(itertools.chain(io.BytesIO(begin), opened), name, first=0, start=0))
            return
    for number, (line, value) in enumerate(json_text.entries(begin, opened, name), start=1):
        yield _object(value, f"{name}:{line} (row {number})")


_LONGEST_LINE = 1 << 24
"""Bytes of a first line that are parsed to find out whether it stands for itself; a longer one is one whole list."""


def _to_content(opened: BinaryIO, most: int = -1) -> bytes:
    """Returns the lines up to and with the first that is not blank, of which no more than `most` bytes are read."""
    lines = []
    while line := opened.readline(most):
        lines.append(line)
        if line.strip():
            break
    return b"".join(lines)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _line(content: bytes, position: int) -> int:
    """Returns the number of the line that a byte stands on."""
    return content.count(b"\n", 0, position) + 1


def _read_csv(opened: BinaryIO, name: str, *, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.TextIOWrapper(opened, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        columns = next(reader, [])
        twice = next((column for column in columns if columns.count(column) > 1), None)
        if twice is not None:
            raise DataError(f"the column {twice!r} is named twice. Rename one of them.", where=f"{name}:1")
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(columns):
                yield Row({}, f"{name}:{line}", f"the row has {len(values)} values for {len(columns)} columns.")
            elif values and any("\0" in value for value in values):
                yield Row({}, f"{name}:{line}", "the row holds a NUL byte: the file may be damaged, or not UTF-8.")
            elif values:
                yield Row(dict(zip(columns, values, strict=True)), f"{name}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"the file is not CSV: {error}.", where=f"{name}:{line}") from error
    except UnicodeDecodeError as error:
        where = f"{name}:{_first_undecodable(opened) or line}"
        raise DataError("the file is not UTF-8.", where=where, fix=SAVE_AS_UTF8) from error


def _first_undecodable(opened: BinaryIO) -> int | None:
    """Returns the number of the first line that is not UTF-8; text is decoded in blocks, which do not tell it.

    None where a file cannot be read again from its beginning.
    """
    try:
        opened.seek(0)
        for number, line in enumerate(opened, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    except (OSError, ValueError):
        return None
    return None


def _read_tsv(opened: BinaryIO, name: str) -> Iterator[Row]:
    yield from _read_csv(opened, name, delimiter="\t")


def _read_text(opened: BinaryIO, name: str) -> Iterator[Row]:
    """A text file is one document."""
    content = opened.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{name}:{_line(content, error.start)}"
        yield Row({}, where, f"the file is not UTF-8 (byte {error.start + 1}). {SAVE_AS_UTF8}")
        return
    place = content.find(b"\0")
    if place >= 0:
        yield Row({}, f"{name}:{_line(content, place)}", f"the file holds a NUL byte (byte {place + 1}).")
        return
    yield Row({"text": text}, name)


def _read_parquet(opened: BinaryIO, name: str, *, skip: int = 0) -> Iterator[Row]:
    """Row groups that are skipped whole are not read."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(opened)
        before, group = 0, 0
        while group < file.num_row_groups and before + file.metadata.row_group(group).num_rows <= skip:
            before += file.metadata.row_group(group).num_rows
            group += 1
        batches = file.iter_batches(batch_size=1024, row_groups=list(range(group, file.num_row_groups)))
        yield from itertools.islice(_arrow_rows(batches, name, before=before), skip - before, None)
    except pyarrow.ArrowException as error:
        raise DataError(f"the file is not Parquet: {_sentence(error)}", where=name, fix=_AGAIN) from error


def _read_arrow(opened: BinaryIO, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import ipc

    try:
        is_file = opened.read(6) == b"ARROW1"
        opened.seek(0)
        if is_file:
            reader = ipc.open_file(opened)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(opened))
        yield from _arrow_rows(batches, name)
    except pyarrow.ArrowException as error:
        raise DataError(f"the file is not Arrow: {_sentence(error)}", where=name, fix=_AGAIN) from error


_AGAIN = "It may be damaged or of another type: write or fetch it again, or set file_type."


def _sentence(error: Exception) -> str:
    return str(error).rstrip(". \n") + "."


def _arrow_rows(batches: Iterator[Any], name: str, *, before: int = 0) -> Iterator[Row]:
    number = before
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield Row(without_missing(value), f"{name}:row {number}")


def without_missing(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a table without the nulls inside its fields; those of the row itself stay.

    A column of objects has every key that any row has, null where this one lacks it: arguments of other tools' calls,
    properties of other tools. They are not what the row says.
    """
    return {name: _present(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        # Lists of numbers are long and hold no objects.
        return [_present(inner) for inner in value] if value and isinstance(value[0], dict | list) else value
    return value


_JSON_NAMES = {
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}

FILE_TYPES: dict[str, Callable[[BinaryIO, str], Iterator[Raw]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}
"""File type -> reader of an opened file."""

_SUFFIXES = {
    **{name: name for name in FILE_TYPES},
    "ndjson": "jsonl",
    "txt": "text",
    "md": "text",
    "feather": "arrow",
    "pq": "parquet",
}
