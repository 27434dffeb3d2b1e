"""The command `stoker`: one thin file a command. Exit codes: 0 done, 1 failure, 2 the user's mistake, 130 interrupted.

Commands import what they need when they run, so that `stoker --help` answers in well under half a second.
"""

import errno
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from stoker import __version__
from stoker.cli import (
    bench,
    chat,
    check,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    init,
    inspect,
    launch,
    merge,
    models,
    plan,
    prepare,
    train,
)
from stoker.errors import StokerError, UserError

_FREE_SPACE = "Free some space (`df -h` shows which disk is full) or name another folder."
_OTHER_FOLDER = "Name a folder that you may write to."
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "Raise the largest size of a file that is allowed (`ulimit -f`) or name a folder on another disk.",
    errno.EROFS: _OTHER_FOLDER,
    errno.EACCES: _OTHER_FOLDER,
    errno.EPERM: _OTHER_FOLDER,
}
"""What helps where a file cannot be written."""

app = typer.Typer(
    name="stoker",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"stoker {__version__}")
        raise typer.Exit


@app.callback(epilog="Start here: stoker init -o run.yaml, then stoker check run.yaml, then stoker train run.yaml")
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune language models: one YAML, from a laptop's CPU to many GPUs."""


app.command("init")(init.command)
app.command("check")(check.command)
app.command("convert")(convert.command)
app.command("plan")(plan.command)
app.command("prepare")(prepare.command)
app.command("inspect")(inspect.command)
app.command("train")(train.command)
app.command("launch")(launch.command)
app.command("eval")(evaluate.command)
app.command("chat")(chat.command)
app.command("generate")(generate.command)
app.command("merge")(merge.command)
app.command("export")(export.command)
app.command("models")(models.command)
app.command("bench")(bench.command)
app.command("doctor")(doctor.command)


def main() -> None:
    """Runs the command line; a mistake of the user ends in a message and exit code 2, never in a traceback."""
    _quieten()
    try:
        app()
    except StokerError as error:
        from stoker.compose.launch import restarts_in_vain

        _complain([str(problem) for problem in error.problems])
        if isinstance(error, UserError) and (sentence := restarts_in_vain()):
            typer.echo(sentence, err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = error.filename or "a file that was being written"  # of which the error has no name
        _complain([f"{where}: {error.strerror}. {_REMEDIES[error.errno]}"])
        sys.exit(1)
    except KeyboardInterrupt:
        _complain(["Interrupted."])
        sys.exit(130)


def _complain(lines: list[str]) -> None:
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in lines:
        console.print("[bold red]error:[/] ", end="")
        console.print(line, markup=False)
    if len(lines) > 1:
        console.print(f"{len(lines)} problems", style="bold")


def _quieten() -> None:
    """Keeps the libraries' banners off the user's screen; our own messages say what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    main()
