"""`stoker models`: which models train here, how, and what works; or which path one model takes, and why."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from stoker.cli.options import Revision, TrustRemoteCode

if TYPE_CHECKING:
    from stoker.arch.support import Support


def command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A folder, a Hub id or a model type; leave it out for the whole table."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which model types train natively and which through Transformers, and what works for each.

    Example: stoker models facebook/opt-125m
    """
    from stoker.arch.support import COLUMNS, row_of, rows
    from stoker.compose.models import Fact, describe

    if model is None:
        _print_table(rows())
        return
    row = row_of(model)
    facts = [Fact("path", f"{row.path}: {row.family}")] if row else []
    if row is None:
        facts, row = describe(model, revision=revision, trust_remote_code=trust_remote_code)
    if row is not None:
        facts += map(Fact, COLUMNS, row.cells())
        facts.append(Fact("tested for", ", ".join(row.held_to)))
    for name, text in facts:
        typer.echo(f"{name:<12}{text}")


def _print_table(rows: "Iterable[Support]") -> None:
    from stoker.arch.support import COLUMNS

    table = [("model type", "path", "family", *COLUMNS)]
    table += [(row.model_type, row.path, row.family, *row.cells()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        typer.echo("  ".join(map(str.ljust, cells, widths)).rstrip())
