"""`stoker eval`: the loss of a trained model on held-out rows."""

from typing import Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    allow_unknown: AllowUnknown = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="What to evaluate: a run's, adapter's or model's folder. Default: output.folder."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Evaluate model.base as it was before training.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print loss and perplexity on data.validation (and on data.train when there is no validation).

    Example: stoker eval run.yaml --set data.validation=held-out.jsonl
    """
    from stoker.cli.read import read
    from stoker.errors import ConfigError

    if base and model is not None:
        raise ConfigError("--base evaluates model.base, so --model has no meaning with it.", fix="Give one of them.")
    config = read(run_file, overrides, allow_unknown=allow_unknown, to_stderr=True).config

    from stoker.compose.evaluate import evaluate

    evaluate(config, model=config.model.base if base else model, json_output=json_output)
