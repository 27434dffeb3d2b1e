"""`stoker train`: run a YAML."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile
from stoker.cli.read import read
from stoker.config.load import Loaded, load_with_origins

if TYPE_CHECKING:
    from stoker.compose.train import RunResult


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output.folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds another run.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one for each GPU: engine.num_processes.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Times to go on from the last checkpoint after a process died.")
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Try it even if the plan says that it does not fit in memory.")
    ] = False,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Train what the YAML describes, Stoker's or Axolotl's; Ctrl-C saves and stops.

    Example: stoker train run.yaml --gpus 2 --set train.learning_rate=1e-4
    """
    from stoker.compose import launch
    from stoker.errors import ConfigError

    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite throws it away.", fix="Give one of them.")
    if gpus is not None:
        overrides = [*overrides, f"engine.num_processes={gpus}"]
    if launch.is_worker():
        with launch.recorded():
            loaded = load_with_origins(run_file, overrides, allow_unknown=allow_unknown)
            result = _train(loaded, resume=resume, overwrite=overwrite, force=force)
            launch.tell_interrupted(result.interrupted_by)
        launch.end(0)  # Also where a signal stopped it, which the agent's process knows: it would start it again.
    loaded = read(run_file, overrides, allow_unknown=allow_unknown)
    if launch.is_inside_another():
        launch.end(_train(loaded, resume=resume, overwrite=overwrite, force=force).exit_code)
    from stoker.compose.devices import planned_processes
    from stoker.compose.hardware import gpus_here

    arguments = sys.argv[1:]
    count, why = planned_processes(loaded.config, gpus_here())
    if why:
        typer.echo(why)
        arguments = [*arguments, "--gpus", str(count)]
    if count > 1 or max_restarts:
        raise typer.Exit(launch.start(arguments, num_processes=count, max_restarts=max_restarts))
    raise typer.Exit(_train(loaded, resume=resume, overwrite=overwrite, force=force).exit_code)


def _train(loaded: Loaded, *, resume: bool, overwrite: bool, force: bool) -> "RunResult":
    from stoker.compose.train import train

    return train(loaded, resume_run=resume, overwrite=overwrite, force=force)
