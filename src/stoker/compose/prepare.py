"""Rows prepared ahead of a run, with progress on the console; `stoker prepare`, and what the cache holds."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from stoker import builtin
from stoker.config.row_formats import expanded
from stoker.config.schema import Data, Pretrain, RunConfig, Source
from stoker.data import cache_list
from stoker.data.options import ChatOptions, PromptTexts
from stoker.data.prepare import Prepared, Progress, Report, SourceOptions, prepare
from stoker.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_CACHE = Data.model_fields["cache_folder"].default
_MIN_SECONDS = 1.0
"""A preparation that takes less is not worth a line."""


def prepare_sources(
    config: RunConfig,
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    console: Console,
    label: str,
) -> Prepared:
    """Returns the documents of `sources`, from the cache or made now, and says what was kept where."""
    started = time.monotonic()
    with progress(console, label) as report:
        prepared = prepare(
            [source_options(source) for source in sources],
            tokenizer=tokenizer,
            cache_folder=cache_folder(config.data),
            num_workers=config.data.num_workers,
            progress=report,
            **row_options(config),
        )
    seconds = time.monotonic() - started
    if prepared.cached:
        say(console, f"{label:<10}  prepared before, from {prepared.folder}")
    elif seconds > _MIN_SECONDS:
        rows = prepared.audit.rows
        speed = f"{rows:,} rows in {seconds:,.1f} s ({rows / seconds:,.0f} rows/s)"
        say(console, f"{label:<10}  prepared {speed}, kept in {prepared.folder}")
    return prepared


def row_options(config: RunConfig) -> dict[str, Any]:
    """Returns what shapes the documents, as the data room calls it."""
    data = config.data
    return {
        "sequence_length": data.sequence_length,
        "train_on": data.train_on if isinstance(data.train_on, str) else tuple(data.train_on),
        "train_on_end_of_turn": data.train_on_end_of_turn,
        "end_of_turn_tokens": tuple(data.end_of_turn_tokens),
        "template": config.model.chat_template,
        "on_bad_row": data.on_bad_row,
        "on_long": "split" if isinstance(config.task, Pretrain) else data.on_long,
        "min_length": data.min_length,
        "deduplicate": data.deduplicate,
    }


def cache_folder(data: Data) -> Path:
    """Returns where prepared rows are kept."""
    return Path(data.cache_folder).expanduser() / "data"


def source_options(source: Source) -> SourceOptions:
    """Returns a source as the data room calls it."""
    source = expanded(source)
    path = str(builtin.resolve_rows(source.path)) if builtin.is_builtin(source.path) else source.path
    chat = source.chat.model_dump()
    train_on = chat.pop("train_on")
    return SourceOptions(
        path=path,
        format=source.format,
        fields=source.fields.model_dump(exclude_none=True, exclude={"message_properties"}),
        split=source.split,
        name=source.name,
        limit=source.limit,
        file_type=source.file_type,
        chat=ChatOptions(
            **chat,
            message_properties=source.fields.message_properties,
            train_on=(train_on,) if isinstance(train_on, str) else None if train_on is None else tuple(train_on),
        ),
        prompt=PromptTexts(**source.prompt.model_dump()),
        data_files=tuple(source.data_files),
        revision=source.revision,
        shard=source.shard.index if source.shard else 0,
        num_shards=source.shard.num if source.shard else 1,
        weight=source.weight,
    )


@contextmanager
def progress(console: Console, label: str) -> Iterator[Report]:
    """Shows rows, rows a second and the time that is left while rows are prepared; nothing where no terminal is."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(f"preparing {label} rows", total=None)

        def report(state: Progress) -> None:
            if state.waiting:
                bars.update(task, description=f"waiting for another process that prepares the {label} rows")
                return
            speed = state.rows / max(time.monotonic() - started, 1e-9)
            text = f"preparing {label} rows: {state.rows:,} ({speed:,.0f} rows/s)"
            known = state.share is not None
            bars.update(task, description=text, completed=state.share or 0.0, total=1.0 if known else None)

        yield report


def prepare_ahead(config: RunConfig, *, console: Console | None = None) -> None:
    """Prepares the rows that a run will read, training and validation, and says what they hold.

    Raises:
        DataError: the data cannot be read, or the audit finds a fault.
    """
    from stoker.compose.data import prepare_data, refuse_faults, summary
    from stoker.compose.model import load_tokenizer_of, open_base_of
    from stoker.plan.limits import fitted

    console = console or Console()
    base = open_base_of(config)
    config = fitted(config, base.spec)
    if config.data.streaming:
        raise ConfigError("data.streaming = true keeps nothing, so there is nothing to prepare.", fix="Train at once.")
    # Whatever `data.prepare` says: this command is the time ahead.
    config = config.model_copy(update={"data": config.data.model_copy(update={"prepare": "ahead"})})
    tokenizer = load_tokenizer_of(config, base)
    data = prepare_data(config, tokenizer, console=console)
    for name, text in summary(config, data):
        say(console, f"{name:<10}  {text}")
    for sentence in [*data.notices, *refuse_faults(data.audits)]:
        say(console, sentence, style="yellow")


def look_after_cache(
    config: RunConfig | None,
    *,
    list_entries: bool,
    prune: bool,
    unused_days: float | None = None,
    console: Console | None = None,
) -> None:
    """Removes what is stale (`prune`), then lists what is kept; of the configuration's cache or the default one."""
    console = console or Console()
    folder = Path(_DEFAULT_CACHE).expanduser() / "data" if config is None else cache_folder(config.data)
    if prune:
        prune_cache(folder, unused_days=unused_days, console=console)
    if list_entries:
        list_cache(folder, console=console)


def list_cache(folder: Path, *, console: Console) -> None:
    """Prints what the cache of prepared data holds: sizes, ages, sources, and why what is stale is."""
    found = cache_list.entries(folder)
    if not found:
        say(console, f"{folder} holds no prepared data.")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("key", "size", "made", "used", "documents", "from", "state"):
        table.add_column(name, overflow="fold", justify="right" if name in ("size", "documents") else "left")
    for entry in found:
        table.add_row(
            entry.key[:12],
            _size(entry.num_bytes),
            _ago(entry.age_seconds),
            _ago(entry.unused_seconds),
            f"{entry.documents:,}",
            ", ".join(entry.sources) or "?",
            f"stale: {entry.stale}" if entry.stale else "current",
        )
    console.print(table)
    stale = [entry for entry in found if entry.stale]
    say(console, f"{len(found)} in {folder}, {_size(sum(entry.num_bytes for entry in found))}; {len(stale)} stale.")


def prune_cache(folder: Path, *, unused_days: float | None, console: Console) -> None:
    """Removes stale prepared data, and what was not used for so many days, and says what."""
    removed = cache_list.prune(folder, unused_days=unused_days)
    for entry in removed:
        why = entry.stale or f"not used for {_ago(entry.unused_seconds).removesuffix(' ago')}"
        say(console, f"removed {entry.key[:12]} ({_size(entry.num_bytes)}): {why}")
    freed = sum(entry.num_bytes for entry in removed)
    say(console, f"{len(removed)} removed from {folder}, {_size(freed)} freed.")


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints a sentence as it is."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit} ago"
    return f"{max(seconds, 0):,.0f} seconds ago"
