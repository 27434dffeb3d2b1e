"""`stoker inspect`: look at the data as the model will see it."""

from typing import Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    allow_unknown: AllowUnknown = False,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="How many rows to show.")] = 3,
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
) -> None:
    """Show rows with trained tokens in colour and audit the data; exits with 2 if the audit finds a fault.

    Example: stoker inspect run.yaml -n 5
    """
    from stoker.cli.read import read
    from stoker.errors import ConfigError

    if split not in ("train", "validation"):
        raise ConfigError(f"--split {split!r} is not a split.", fix="Use train or validation.")
    config = read(run_file, overrides, allow_unknown=allow_unknown).config

    from stoker.compose.inspect import inspect

    inspect(config, rows=rows, split=split)
