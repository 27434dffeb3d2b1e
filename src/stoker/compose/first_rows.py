"""What is wrong with a source by its first rows, for `stoker check`: apart from the rest, to import nothing heavy."""

from stoker import builtin
from stoker.config import row_formats
from stoker.config.schema import Source
from stoker.data import first_rows, sources
from stoker.errors import DataError, Problem


def problem(source: Source, where: str, *, task: str) -> Problem | None:
    """Returns what preparation will say of the first rows of files here, the source at key `where`; None if nothing.

    Where a slice begins that counts from the end or by the hundred, all rows would have to be counted for: that is not
    looked at.
    """
    source = row_formats.expanded(source)
    path = str(builtin.resolve_rows(source.path)) if builtin.is_builtin(source.path) else source.path
    try:
        found = sources.find(
            path,
            split=source.split,
            data_files=source.data_files,
            file_type=source.file_type,
            limit=source.limit,
            shard=source.shard.index if source.shard else 0,
            num_shards=source.shard.num if source.shard else 1,
        )
        if found.split.needs_total:
            return None
        raws = (raw for raw, _ in found.read())
        fields = source.fields.model_dump(exclude_none=True, exclude={"message_properties"})
        looked = first_rows.look(raws, format_name=source.format, fields=fields, where=path)
    except DataError as error:
        first = error.problems[0]
        return Problem(f"{where}: {first.where or source.path}: {first.what}", fix=first.fix)
    if looked.format.kind == "documents":
        return None
    form = looked.format
    return Problem(
        f"{where}: {source.path}: the rows are {form.kind} ({form.name}, {looked.reason}), which task {task} does not "
        "learn from.",
        fix=row_formats.INSTEAD_OF_JUDGED,
    )
