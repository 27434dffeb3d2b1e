"""`stoker merge`: fold an adapter into its base."""

from typing import Annotated

import typer

from stoker.cli.options import Base, Dtype, MaxShardSize, NewFolder, TrustRemoteCode
from stoker.cli.signals import leaving_on_signals

Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER", help="A run's folder, an adapter's folder, or a checkpoint (RUN/checkpoints/step-...)."
    ),
]


def command(
    adapter: Adapter,
    output: NewFolder,
    base: Base = None,
    dtype: Dtype = "auto",
    max_shard_size: MaxShardSize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a folder that Transformers loads, after checking its logits against adapter and base.

    A model is merged one tensor at a time, so that any fits into memory. Of a checkpoint that holds a whole model,
    writes that.

    Example: stoker merge runs/quickstart -o merged
    """
    from stoker.compose.merge import merge

    with leaving_on_signals():
        report = merge(
            adapter, output, base=base, dtype=dtype, max_shard_size=max_shard_size, trust_remote_code=trust_remote_code
        )
    typer.echo(report)
