"""What the rows of a run are prepared from, as the data room calls it; prepared with progress on the console."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from stoker.compose.source_options import source_options
from stoker.config.schema import Data, Pretrain, RunConfig, Source
from stoker.data.prepare import Prepared, Progress, Report, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints a sentence as it is."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)
