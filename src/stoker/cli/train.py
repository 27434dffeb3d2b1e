"""`stoker train`: run a YAML."""

from typing import Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output.folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds another run.")
    ] = False,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Train what the YAML describes, Stoker's or Axolotl's; Ctrl-C saves and stops.

    Example: stoker train run.yaml --set train.learning_rate=1e-4
    """
    from stoker.cli.read import read
    from stoker.errors import ConfigError

    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite throws it away.", fix="Give one of them.")
    loaded = read(run_file, overrides, allow_unknown=allow_unknown)

    from stoker.compose.train import train

    result = train(loaded, resume_run=resume, overwrite=overwrite)
    raise typer.Exit(result.exit_code)
