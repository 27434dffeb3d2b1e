"""`stoker prepare`: rows prepared ahead of a run, and what the cache of prepared rows holds."""

from pathlib import Path

from rich.console import Console

from stoker.compose.data import prepare_data, refuse_faults, summary
from stoker.compose.model import load_tokenizer_of, open_base_of
from stoker.compose.sources import cache_folder, say
from stoker.config.schema import Data, RunConfig
from stoker.data import cache_list
from stoker.errors import ConfigError
from stoker.plan.limits import fitted

_LISTED = ("key", "size", "made", "used", "documents", "from", "state")
_DEFAULT_CACHE = Data.model_fields["cache_folder"].default


def prepare_ahead(config: RunConfig, *, console: Console | None = None) -> None:
    """Prepares the rows that a run will read, training and validation, and says what they hold.

    Raises:
        DataError: the data cannot be read, or the audit finds a fault.
    """
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
    rows = [_LISTED] + [
        (
            entry.key[:12],
            _size(entry.num_bytes),
            _ago(entry.age_seconds),
            _ago(entry.unused_seconds),
            f"{entry.documents:,}",
            ", ".join(entry.sources) or "?",
            f"stale: {entry.stale}" if entry.stale else "current",
        )
        for entry in found
    ]
    # Lines as long as they are, for a terminal to wrap: columns squeezed into it would cut paths to pieces.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if name in ("size", "documents") else cell.ljust(width)
            for name, cell, width in zip(_LISTED, row, widths, strict=True)
        ]
        say(console, "  ".join(cells).rstrip())
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
