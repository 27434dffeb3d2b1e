"""`stoker convert`: an Axolotl YAML as one of ours."""

from pathlib import Path
from typing import Annotated

import typer

from stoker.cli.options import AllowUnknown


def command(
    their_file: Annotated[Path, typer.Argument(metavar="THEIR.YML", help="A YAML for Axolotl.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN.YAML", help="Write it here; to the terminal unless set."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Write an Axolotl YAML as one of Stoker's, with a comment wherever the meaning shifted.

    Example: stoker convert their.yml -o run.yaml
    """
    from stoker.cli.read import read
    from stoker.config.axolotl.convert import to_yaml
    from stoker.errors import ConfigError

    loaded = read(their_file, (), allow_unknown=allow_unknown, to_stderr=True)
    if loaded.translation is None:
        raise ConfigError(f"{their_file} is a YAML of Stoker's already.", fix="Name one of Axolotl's.")
    text = to_yaml(loaded.translation)
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists() and not force:
        raise ConfigError(f"{output} is there already.", fix="Use --force to write over it, or name another file.")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}.") from None
    typer.echo(f"Wrote {output}. Next: stoker check {output}")
