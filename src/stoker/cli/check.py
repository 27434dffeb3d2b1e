"""`stoker check`: everything that is wrong with a YAML, before anything is loaded."""

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    allow_unknown: AllowUnknown = False,
) -> None:
    """Find every mistake in a YAML, with its line and what to write instead; loads no model, asks no network.

    Example: stoker check run.yaml --set train.learning_rate=1e-4
    """
    from stoker.cli import preflight
    from stoker.cli.read import read
    from stoker.errors import ConfigError

    loaded = read(run_file, overrides, allow_unknown=allow_unknown)
    spec, problems = preflight.look(loaded)
    if problems:
        raise ConfigError(problems)
    typer.echo(f"{run_file} is fine.")
    for name, text in preflight.summary(loaded.config, spec):
        typer.echo(f"  {name:<8}{text}")
    typer.echo(
        f"Next: stoker inspect {run_file} shows the rows as the model sees them; stoker train {run_file} starts."
    )
