"""The YAML and the plan of each person in docs/choosing.md: what the commands there print."""

import os
import tempfile
from pathlib import Path
from unittest import mock

EXAMPLES = Path(__file__).parents[1] / "examples" / "choosing"
# What is asked of `stoker plan` beside the YAML: hardware, sizes of the model, and the rows that nobody has here.
ARGUMENTS = {
    "free_t4": "--shape llama-3.1-8b --gpu t4 --rows 2000 --tokens-per-row 500 --trained-share 0.4",
    "home_4090": "--shape llama-3.1-8b --gpu 4090 --rows 20000 --tokens-per-row 600 --trained-share 0.4",
    "rented_h100": "--shape llama-3.1-8b --gpu h100 --rows 200000 --tokens-per-row 600 --trained-share 0.4",
    "node_70b": "--shape llama-3.1-70b --gpu h100 --gpus-per-node 8 --rows 50000 --tokens-per-row 900 "
    "--trained-share 0.4 --deadline 12h",
    "two_nodes_full": "--shape llama-3.1-8b --gpu h100 --gpus-per-node 8 --nodes 2 --network 400 --rows 400000 "
    "--tokens-per-row 1500 --trained-share 1 --deadline 1h",
}


def blocks() -> dict[str, str]:
    """Returns for each person the YAML, the command and what it prints, as Markdown."""
    return {name: _block(name) for name in ARGUMENTS}


def _block(name: str) -> str:
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    file = f"examples/choosing/{name}.yaml"
    return f"```yaml\n{text}```\n\n```console\n$ stoker plan {file} {ARGUMENTS[name]}\n{plan(name)}```\n"


def plan(name: str) -> str:
    """Returns what `stoker plan` prints, without what this machine has measured."""
    from typer.testing import CliRunner

    from stoker.cli.main import app

    with tempfile.TemporaryDirectory() as nothing, mock.patch.dict(os.environ, STOKER_CACHE=nothing):
        result = CliRunner().invoke(app, ["plan", str(EXAMPLES / f"{name}.yaml"), *ARGUMENTS[name].split()])
    if result.exit_code:
        raise RuntimeError(f"stoker plan {name}: {result.output}") from result.exception
    return "\n".join(line.rstrip() for line in result.output.splitlines()) + "\n"
