"""What a source begins with: the format of its rows, by the first of them."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from stoker.data import formats
from stoker.data.formats import Format
from stoker.data.options import Reading
from stoker.data.readers import Raw, Row, parsed
from stoker.errors import DataError

_NUM_ROWS = 32


class Looked(NamedTuple):
    """The format of a source, how that is known, and its first rows."""

    format: Format
    reason: str
    rows: list[Row]

    @property
    def sound(self) -> list[dict[str, Any]]:
        """Those of the rows that are not malformed."""
        return [row.value for row in self.rows if row.error is None]

    def refusal(self, reading: Reading) -> DataError | None:
        """Returns the error with which the first row that cannot be taken stops a preparation, or None."""
        for row in self.rows:
            try:
                if row.error is not None:
                    raise DataError(row.error)
                formats.convert(self.format, row.value, reading)
            except DataError as error:
                return stopped_at(row.where, error)
        return None


def look(raws: Iterable[Raw], *, format_name: str, fields: Mapping[str, str], where: str) -> Looked:
    """Returns what the rows begin with, in the format of that name, or for "auto" in the one that most of them have.

    Raises DataError if there are no rows, only malformed ones or such of no known format, or if `fields` names what the
    format does not have.
    """
    rows = _first(raws, where)
    if format_name == "auto":
        sound = [row.value for row in rows if row.error is None]
        detection = formats.detect(sound, where, fields=fields)
        form, reason = detection.format, f"detected: {detection.reason}"
    else:
        form, reason = formats.declared(format_name), "declared"
    formats.check_fields(form, fields, where)
    return Looked(form, reason, rows)


def stopped_at(where: str, error: DataError) -> DataError:
    """Returns the error that stops a preparation at a row which cannot be taken, and says how to go on without it."""
    problem = error.problems[0]
    fix = f"{problem.fix} " if problem.fix else ""
    return DataError(problem.what, where=where, fix=f"{fix}(data.on_bad_row: skip leaves such rows out.)")


def _first(raws: Iterable[Raw], where: str) -> list[Row]:
    found = [parsed(raw) for raw in islice(raws, _NUM_ROWS)]
    if not found:
        raise DataError("the source holds no rows.", where=where, fix="Check the file, or remove the source.")
    if all(row.error is not None for row in found):
        first = found[0]
        which = f"the first {len(found)} rows are all" if len(found) > 1 else "the first row is"
        raise DataError(f"{which} malformed: {first.error}", where=first.where)
    return found
