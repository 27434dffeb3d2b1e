"""Readers of data files: each yields rows with their place, and goes on after a malformed one."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stoker.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row of a source, its place (`file:line`, or `file:row` for binary files), and what is wrong with it if so."""

    value: dict[str, Any]
    where: str
    error: str | None = None


def file_type_of(path: Path) -> str | None:
    """Returns the type that a file's suffix tells (`.gz` aside), None if it is not a known one."""
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def read_file(path: Path, *, file_type: str | None = None) -> Iterator[Row]:
    """Yields the rows of a file. Raises DataError if the file as a whole cannot be read."""
    kind = file_type or file_type_of(path)
    if kind is None:
        raise DataError(
            f"the file's suffix {path.suffix!r} does not tell what it holds.",
            where=str(path),
            fix=f"Set file_type to one of {', '.join(FILE_TYPES)}.",
        )
    try:
        with _open(path) as opened:
            yield from FILE_TYPES[kind](opened, str(path))
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged gzip file
        raise DataError(f"the file cannot be read: {error}.", where=str(path)) from error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _object(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return Row(value, where)
    return Row(
        {}, where, f"the row is {_JSON_NAMES.get(type(value), type(value).__name__)}, not an object with fields."
    )


def _read_jsonl(opened: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(opened, start=1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield _object(json.loads(text), where)
        except UnicodeDecodeError as error:
            yield Row({}, where, f"the line is not UTF-8 (byte {error.start + 1}).")
        except json.JSONDecodeError as error:
            yield Row({}, where, f"the line is not JSON: {error.msg} at column {error.colno}.{_hint(line)}")
        except RecursionError:
            yield Row({}, where, "the line is JSON nested too deeply.")


def _hint(line: bytes) -> str:
    return " The file looks like one JSON list; name it .json." if line.strip() in (b"[", b"[{", b"{") else ""


def _read_json(opened: BinaryIO, name: str) -> Iterator[Row]:
    content = opened.read()
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"the file is not UTF-8 (byte {error.start + 1}).", where=name) from error
    except RecursionError as error:
        raise DataError("the file is JSON nested too deeply.", where=name) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.lstrip()[:1] == b"{":
            yield from _read_jsonl(io.BytesIO(content), name)
            return
        raise DataError(f"the file is not JSON: {error.msg}.", where=f"{name}:{error.lineno}") from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if not isinstance(document, list):
        found = f"an object with: {', '.join(document)}" if isinstance(document, dict) else type(document).__name__
        raise DataError(
            f"the file holds {found}.", where=name, fix='Use a list of rows, or an object {"data": [rows]}, or JSONL.'
        )
    for number, value in enumerate(document, start=1):
        yield _object(value, f"{name}:row {number}")


def _read_csv(opened: BinaryIO, name: str, *, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.TextIOWrapper(opened, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        columns = next(reader, [])
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(columns):
                yield Row({}, f"{name}:{line}", f"the row has {len(values)} values for {len(columns)} columns.")
            elif values:
                yield Row(dict(zip(columns, values, strict=True)), f"{name}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"the file is not CSV: {error}.", where=f"{name}:{line}") from error
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8.", where=f"{name}:{line}") from error


def _read_tsv(opened: BinaryIO, name: str) -> Iterator[Row]:
    yield from _read_csv(opened, name, delimiter="\t")


def _read_text(opened: BinaryIO, name: str) -> Iterator[Row]:
    """A text file is one document."""
    try:
        yield Row({"text": opened.read().decode("utf-8-sig")}, name)
    except UnicodeDecodeError as error:
        yield Row({}, name, f"the file is not UTF-8 (byte {error.start + 1}).")


def _read_parquet(opened: BinaryIO, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(opened).iter_batches(batch_size=1024)
        yield from _arrow_rows(batches, name)
    except pyarrow.ArrowException as error:
        raise DataError(f"the file is not Parquet: {error}", where=name) from error


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
        raise DataError(f"the file is not Arrow: {error}", where=name) from error


def _arrow_rows(batches: Iterator[Any], name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield Row(value, f"{name}:row {number}")


_JSON_NAMES = {
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}

FILE_TYPES: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
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
