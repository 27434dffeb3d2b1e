"""The forward of a layer's feed-forward, with its adapters and its residual, and the options of a layer.

y = m + down(gated(gate_up(x)))        x [N, D]: the normed rows of m
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stoker.kernels import glu
from stoker.kernels.fp8 import Rounded
from stoker.kernels.head_exchange import HeadExchange
from stoker.kernels.offload import HostOffload
from stoker.kernels.projection import Piece, Projection, product_of, project, project_onto, rounded_input
from stoker.kernels.rounded_glu import gated_rounded
from stoker.kernels.scaled_glu import gated_scaled

KEEP = ("all", "mixer", "attention", "input")


@dataclass(frozen=True)
class BlockOptions:
    """How a layer computes: heads, the norms' epsilons, the sliding window, the kernels, and what it keeps (KEEP).

    `activation`: of the feed-forward's gate; `interleaved`: neighbouring channels turn together (`rope`);
    `scale`: of attention's scores, 1 / sqrt(E) for None; `head_epsilon`: of the norms of
    queries and keys, where there are. `exchange`: x is this rank's part of rows that several ranks share.
    With `offload`, x and what attention keeps wait on the host for the backward. With `tile_tokens` (not on the rung
    "all"), the feed-forward runs so many tokens at a time in both directions: of 2F values a token, the widest of the
    layer, no more than a tile's exist at once, however long the row.
    """

    num_heads: int
    num_kv_heads: int
    epsilons: tuple[float, float]
    window: int | None = None
    implementation: str = "reference"
    keep: str = "all"
    offload: HostOffload | None = None
    tile_tokens: int | None = None
    activation: str = "silu"
    interleaved: bool = False
    scale: float | None = None
    head_epsilon: float = 0.0
    exchange: HeadExchange | None = None

    def __post_init__(self) -> None:
        if self.tile_tokens is not None and self.tile_tokens < 1:
            raise ValueError(f"tile_tokens = {self.tile_tokens} is not positive")
        if self.keep not in KEEP:
            raise ValueError(f"keep = {self.keep!r}; allowed: {', '.join(KEEP)}")


def feed_forward(
    projections: Sequence[Projection],
    normed: Tensor,
    mid: Tensor,
    options: BlockOptions,
    *,
    rounded: Rounded | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(mid + output [N, D], what gate_up's product gave if it is kept, the adapters' products of gate_up and of down).

    `rounded`: the normed rows in fp8, if they are there.
    """
    pieces = tiles(normed.shape[0], options)
    # Written tile by tile: results of all tiles beside the tensor that they become would be two.
    output = torch.empty_like(mid) if len(pieces) > 1 else None
    products: tuple[list[Tensor], list[Tensor]] = ([], [])
    kept = None
    for tile in pieces:
        piece = Piece(options.implementation, tile.start)
        room = None if output is None else output[tile]
        part, gate_up, product_gate_up, product_down = _run_tile(
            projections, normed[tile], mid[tile], options.activation, piece, rounded=rows_of(rounded, tile), out=room
        )
        if output is None:
            output = part
        products[0].extend([] if product_gate_up is None else [product_gate_up])
        products[1].extend([] if product_down is None else [product_down])
        kept = gate_up if options.keep == "all" else None
        del gate_up, part
    whole = [_joined(parts) if parts else None for parts in products]
    if output is None:  # no rows
        output = torch.empty_like(mid)
    return output, kept, whole[0], whole[1]


def _run_tile(
    projections: Sequence[Projection],
    normed: Tensor,
    mid: Tensor,
    activation: str,
    piece: Piece,
    *,
    rounded: Rounded | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(mid + output, in `out` if given; gate_up; the adapters' products)."""
    _, _, gate_up, down = projections
    values, product = project(gate_up.unscaled, normed, piece, rounded=rounded)
    implementation, rounded = piece.implementation, rounded_input(down, normed.shape[0], piece.implementation)
    if gate_up.scale is not None:
        options = {"activation": activation, "implementation": implementation}
        activated = gated_scaled(values, gate_up.scale, gate_up.bias, **options)
    elif rounded is None:
        activated = glu.gated(values, activation=activation, implementation=implementation)
    else:
        activated = gated_rounded(values, rounded, activation=activation)
    product_down = product_of(down, activated, piece)
    output = project_onto(down, activated, mid, product_down, implementation=implementation, rounded=rounded, out=out)
    return output, values, product, product_down


def rows_of(rounded: Rounded | None, tile: slice) -> Rounded | None:
    """The rows of a tile, of rows in fp8."""
    return None if rounded is None else Rounded(rounded.values[tile], rounded.scale[tile])


def tiles(num_rows: int, options: BlockOptions) -> list[slice]:
    """Rows of each piece that the feed-forward takes at a time."""
    size = num_rows if options.tile_tokens is None or options.keep == "all" else options.tile_tokens
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, max(1, size))]


def _joined(pieces: list[Tensor]) -> Tensor:
    """The tiles' adapter products as one tensor."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
