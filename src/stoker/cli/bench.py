"""`stoker bench`: measure a run."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    allow_unknown: AllowUnknown = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after three to warm up.")] = 8,
    peers: Annotated[str, typer.Option(help="Other trainers to run beside it: hf,liger,unsloth.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write results to this JSON file, and a CSV beside it.")] = None,
    models: Annotated[Path | None, typer.Option(help="Folder for shape: models; ~/.cache/stoker/shapes.")] = None,
    peer_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a peer may take.")] = 600.0,
    budget: Annotated[
        float | None, typer.Option(min=1.0, help="Seconds after which no peer goes on.", show_default=False)
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Also say where a step's time goes, by kernel; all of it into this CSV.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to note, where there is no git.")] = None,
) -> None:
    """Measure a run's speed and memory on random rows, beside the physical floor and other trainers.

    model.base may be shape:llama-3.1-8b, shape:llama-3.2-1b or another shape of docs/benchmarks.md: random weights, no
    download. With data.packing rows hold documents of real lengths, otherwise each is full.

    Example: stoker bench run.yaml --peers hf,unsloth --out results.json
    """
    from rich.console import Console

    from stoker.cli.read import read
    from stoker.errors import ConfigError

    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out} must end in .json; the CSV goes beside it.")
    config = read(run_file, overrides, allow_unknown=allow_unknown, to_stderr=True).config

    from stoker.compose.bench.run import Options, bench, parse_peers

    options = Options(
        cell=run_file.stem,
        steps=steps,
        peers=tuple(parse_peers(peers)),
        output=out,
        models=models,
        peer_timeout_seconds=peer_timeout,
        budget_seconds=math.inf if budget is None else budget,
        commit=commit,
        profile=profile,
    )
    # A pipe has no width; the table needs one.
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=150)
    bench(config, options, console=console)
