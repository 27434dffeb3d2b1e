"""`stoker prepare`: tokenise the rows of a run ahead of time, and look after what is kept of them."""

from pathlib import Path
from typing import Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides


def command(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.YAML]", help="The run whose rows to prepare.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    allow_unknown: AllowUnknown = False,
    list_: Annotated[bool, typer.Option("--list", help="List what is kept: size, age, and why it is stale.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what is stale.")] = False,
    unused_days: Annotated[
        float | None, typer.Option("--unused-days", min=0.0, help="With --prune: also what was not used for so long.")
    ] = None,
) -> None:
    """Tokenise the rows of a run, so that training starts at once; list or remove what earlier runs left.

    Example: stoker prepare run.yaml; stoker prepare --list; stoker prepare --prune --unused-days 30
    """
    from stoker.cli.read import read
    from stoker.errors import ConfigError

    if unused_days is not None and not prune:
        raise ConfigError("--unused-days goes with --prune.", fix="Add --prune.")
    if run_file is None and not (list_ or prune):
        raise ConfigError("there is nothing to prepare.", fix="Name a run: stoker prepare run.yaml.")
    config = read(run_file, overrides, allow_unknown=allow_unknown).config if run_file is not None else None

    from stoker.compose import prepare

    if list_ or prune:
        prepare.look_after_cache(config, list_entries=list_, prune=prune, unused_days=unused_days)
    elif config is not None:
        prepare.prepare_ahead(config)
