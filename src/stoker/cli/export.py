"""`stoker export`: what a run or a checkpoint trained, in a folder of its own."""

from typing import Annotated

import typer

from stoker.cli.options import Dtype, MaxShardSize, NewFolder
from stoker.cli.signals import leaving_on_signals

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint (RUN/checkpoints/step-000100).")
]


def command(run: Run, output: NewFolder, dtype: Dtype = "auto", max_shard_size: MaxShardSize = None) -> None:
    """Write the adapter (in PEFT's format, not merged) or the model of a run or a checkpoint, with its tokenizer.

    Checkpoints may be of any number of processes and of runs that have not finished; a model is read and written one
    tensor at a time.

    Example: stoker export runs/quickstart/checkpoints/step-000100 -o adapter-100
    """
    from stoker.compose.merge import export

    with leaving_on_signals():
        report = export(run, output, dtype=dtype, max_shard_size=max_shard_size)
    typer.echo(report)
