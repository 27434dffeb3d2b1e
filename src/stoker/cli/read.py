"""Reads the YAML of a command; a file of Axolotl's gets its report shown, whether it can run or not."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.config.axolotl.report import BLANK, TranslationError
from stoker.config.load import Loaded, load_with_origins

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stoker.config.axolotl.outcome import Kind
    from stoker.config.axolotl.report import Line, Report

_COLOURS: "dict[Kind, str]" = {"honoured": "green", "automatic": "cyan", "no effect": "dim", "refused": "bold red"}
_TOGETHER: "tuple[Kind, ...]" = ("automatic", "no effect")


def read(run_file: Path, overrides: Sequence[str], *, allow_unknown: bool = False, to_stderr: bool = False) -> Loaded:
    """Returns the configuration of a command, after the report on an Axolotl file.

    Raises:
        ConfigError: anything in the file or in an override is wrong.
    """
    try:
        loaded = load_with_origins(run_file, overrides, allow_unknown=allow_unknown)
    except TranslationError as error:
        show(error.report, to_stderr=to_stderr)
        raise
    if loaded.translation is not None:
        show(loaded.translation.report, to_stderr=to_stderr)
    return loaded


def show(report: "Report", *, to_stderr: bool = False) -> None:
    """Prints the report: every key with what became of it, those that say the same together."""
    from rich.console import Console

    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        # A pipe has no width, and a cut line would say less than was found.
        console = Console(stderr=to_stderr, highlight=False, width=max(console.width, 150))
    _print(report, console)


def _print(report: "Report", console: "Console") -> None:
    counts = ", ".join(f"{count} {kind}" for kind, count in report.counts().items())
    console.print(f"{report.file} is Axolotl's: {len(report.lines)} keys, {counts}.", markup=False, style="bold")
    console.print(_table(report))
    unknown = [line for line in report.of("no effect") if line.note]
    for line in unknown:
        console.print(f"{line.where}: {line.name} is {line.text}", style="yellow", markup=False, soft_wrap=True)
    console.print()


def _table(report: "Report") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from stoker.config.axolotl.outcome import KINDS
    from stoker.config.document import dotted
    from stoker.config.show import inline

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, max_width=46)
    table.add_column(ratio=2)
    for kind in KINDS:
        for lines, text in _rows(report, kind):
            names = ", ".join(line.name for line in lines)
            notes = list(dict.fromkeys(line.note for line in lines if line.note and line.note != text))
            meaning = Text("; ".join([text, *notes]) if len(lines) == 1 or not notes else text)
            table.add_row(Text(kind, style=_COLOURS[kind]), Text(names), meaning)
    if report.defaults:
        written = ", ".join(f"{dotted(path)}: {inline(value)}" for path, value in report.defaults)
        table.add_row(Text("not set", style="dim"), Text("Axolotl's defaults"), Text(written))
    return table


def _rows(report: "Report", kind: "Kind") -> "list[tuple[list[Line], str]]":
    """Returns the rows of one class: each key has its own, or those that say the same share it; blanks last."""
    if kind not in _TOGETHER:
        return [([line], line.text) for line in report.of(kind)]
    return sorted(report.grouped(kind), key=lambda row: row[1] == BLANK)
