"""What a source begins with: the format of its rows, by the first of them."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from stoker.data import formats
from stoker.data.formats import Format
from stoker.data.readers import Raw, Row, parsed
from stoker.errors import DataError

_NUM_ROWS = 32


class Looked(NamedTuple):
    """The format of a source, how that is known, and those of its first rows that are good."""

    format: Format
    reason: str
    rows: list[dict[str, Any]]


def look(raws: Iterable[Raw], *, format_name: str, fields: Mapping[str, str], where: str) -> Looked:
    """Returns what the rows begin with, in the format of that name, or for "auto" in the one that most of them have.

    Raises DataError if there are no rows, only malformed ones or such of no known format, or if `fields` names what the
    format does not have.
    """
    rows = [row.value for row in _first(raws, where) if row.error is None]
    if format_name == "auto":
        detection = formats.detect(rows, where, fields=fields)
        form, reason = detection.format, f"detected: {detection.reason}"
    else:
        form, reason = formats.declared(format_name), "declared"
    formats.check_fields(form, fields, where)
    return Looked(form, reason, rows)


def _first(raws: Iterable[Raw], where: str) -> list[Row]:
    found = [parsed(raw) for raw in islice(raws, _NUM_ROWS)]
    if not found:
        raise DataError("the source holds no rows.", where=where, fix="Check the file, or remove the source.")
    if all(row.error is not None for row in found):
        first = found[0]
        raise DataError(f"the first {len(found)} rows are all malformed: {first.error}", where=first.where)
    return found
