"""`stoker merge`: fold an adapter into its base."""

from pathlib import Path
from typing import Annotated

import typer

from stoker.cli.options import Base, Trained, TrustRemoteCode


def command(
    adapter: Trained,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), fp32, bf16 or fp16.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a folder that Transformers loads, after checking its logits against adapter and base.

    Example: stoker merge runs/quickstart -o merged
    """
    from stoker.compose.merge import merge

    report = merge(adapter, output, base=base, dtype=dtype, trust_remote_code=trust_remote_code)
    typer.echo(report)
