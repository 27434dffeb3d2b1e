"""What is wrong with a source by its first rows, for `stoker check`: apart from the rest, to import nothing heavy."""

from stoker.compose.source_options import source_options
from stoker.config import row_formats
from stoker.config.schema import RunConfig, Source
from stoker.data import first_rows, sources
from stoker.errors import DataError, Problem


def problem(source: Source, config: RunConfig, where: str) -> Problem | None:
    """Returns what preparation will say of the first rows of files here, the source at key `where`; None if nothing.

    Where a slice begins that counts from the end or by the hundred, all rows would have to be counted for: that is not
    looked at.
    """
    options = source_options(source)
    path = options.path or ""
    try:
        found = sources.find(
            path,
            split=options.split,
            data_files=options.data_files,
            file_type=options.file_type,
            limit=options.limit,
            shard=options.shard,
            num_shards=options.num_shards,
        )
        if found.split.needs_total:
            return None
        raws = (raw for raw, _ in found.read())
        looked = first_rows.look(raws, format_name=options.format, fields=options.fields, where=path)
        form = looked.format
        if form.kind != "documents":
            what = f"{where}: {source.path}: the rows are {form.kind} ({form.name}, {looked.reason})"
            return row_formats.not_learned(what, config.task.kind)
        if config.data.on_bad_row == "stop" and (refusal := looked.refusal(options.reading)):
            raise refusal
    except DataError as error:
        first = error.problems[0]
        return Problem(f"{where}: {first.where or source.path}: {first.what}", fix=first.fix)
    return None
