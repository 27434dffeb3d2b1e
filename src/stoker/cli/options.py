"""Arguments and options that several commands share, each defined once."""

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run to read.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set train.learning_rate=1e-4.")
]
AllowUnknown = Annotated[
    bool, typer.Option("--allow-unknown", help="Let keys through that Axolotl does not know, with a warning.")
]
Trained = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run's folder, an adapter's folder, or a model (folder, Hub id or builtin:tiny-llama)."
    ),
]
Base = Annotated[
    str | None, typer.Option("--base", help="The base of an adapter, if it is not where the adapter says.")
]
NewFolder = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")]
Dtype = Annotated[str, typer.Option(help="auto (each weight's own), fp32, bf16 or fp16.")]
MaxShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file of weights; 5GiB if not said.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this share.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model, if there is no other; of a Hub id only at a commit.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
