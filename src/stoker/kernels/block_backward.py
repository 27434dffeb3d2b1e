"""The backward of a layer, written out (`kernels/block.py` says what a layer is and what its rungs keep)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels import glu
from stoker.kernels.block_parts import Layout, Turn, attend_by, norm, norm_backward, projections_of, to_heads, to_rows
from stoker.kernels.feed_forward import tiles
from stoker.kernels.fp8 import Rounded
from stoker.kernels.kept_attention import KeptAttention
from stoker.kernels.low_rank import Factored, scale_columns
from stoker.kernels.projection import (
    Piece,
    Projection,
    grad_a,
    grad_input,
    grad_product,
    grad_unscaled,
    gradient_factor,
    grads_by_input,
    grads_by_output,
    project,
    project_onto,
    rounded_gradient,
    rounded_input,
)
from stoker.kernels.rounded_glu import gated_rounded_backward
from stoker.kernels.scaled_glu import gated_scaled_backward
from stoker.kernels.triton_support import as_rows


class Kept(NamedTuple):
    """What the forward leaves for the backward; None where the rung drops it."""

    mid: Tensor | None
    gate_up: Tensor | None
    rstds: tuple[Tensor, Tensor]
    products: tuple[Tensor | None, ...]
    qkv: Tensor | None


class Normed(NamedTuple):
    """Rows before a norm, the normed rows where something needs them, and dP times rows' rstd."""

    rows: Tensor
    normed: Tensor | None
    factored: Factored | None


def _factored(projection: Projection, product: Tensor | None, rstd: Tensor) -> Factored | None:
    """Room for dP times the rstd of rows, where A's gradient is made from rows before the norm."""
    return None if product is None or projection.rate > 0.0 else (rstd, torch.empty_like(product))


class Backward:
    """One run of a layer's backward; `norm_grads` and `grads` are those of the norms' weights and of the tensors."""

    def __init__(  # noqa: PLR0917 - private, the saved tensors as they come
        self,
        layout: Layout,
        norms: Sequence[Tensor | None],
        scales: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        needs: Sequence[bool],
        x: Tensor,
        tables: tuple[Tensor, Tensor],
    ) -> None:
        self.layout, self.x = layout, x
        self.norms = [norm for norm in norms[:2] if norm is not None]
        self.turn = Turn(layout.options, tables, *norms[2:])
        self.needs_x, self.needs_norms, self.needs = needs[0], needs[1:5], needs[9:]
        self.projections = projections_of(layout, scales, tensors, x.dtype)
        self.scale_grads: list[Tensor | None] = [None] * len(scales)
        self.norm_grads: list[Tensor | None] = [None, None, None, None]
        self.grads: list[Tensor | None] = [None] * len(tensors)
        self.num_tiles = 1

    def __call__(self, grad: Tensor, attended: KeptAttention | None, kept: Kept) -> Tensor | None:
        """Gradient of x (None where nothing needs it, as below the first layer), from that of the output [B, T, D].

        What attention's backward reads is made after the feed-forward's, where it was not kept: long rows leave no
        memory for both.
        """
        options, layout, rows = self.layout.options, self.layout, as_rows(self.x)
        qkv, out, _, _ = self.projections
        rstd_x = kept.rstds[0]
        heads: tuple[Tensor, ...] = ()
        before = kept.qkv
        if attended is None:
            heads, before = self._heads(kept)
            attended = KeptAttention(attend_by(layout), heads)
        mid = kept.mid
        if mid is None:
            values = to_rows(layout, attended.values())
            mid = project_onto(out, values, rows, kept.products[1], implementation=options.implementation)
            del values
        grad_mid, rounded_mid = self._feed_forward(as_rows(grad), mid, kept)
        del mid
        if not heads and (before is not None or options.keep == "attention"):
            heads, before = self._heads(kept)
        values = to_rows(layout, attended.values())
        grad_attended = self._projection(1, grad_mid, values, kept.products[1], rounded=rounded_mid)
        del rounded_mid, values
        grad_heads = self._grad_heads(attended, grad_attended.view(*self.x.shape[:2], -1), heads)
        del heads, attended, grad_attended
        rounded_qkv = self._room(0, rows.shape[0]) if self.turn.rounds(grad_heads[0].shape[-1]) else None
        grad_qkv, *self.norm_grads[2:] = self.turn.backward(
            grad_heads, before, needs_weights=any(self.needs_norms[2:]), rounded=rounded_qkv
        )
        grad_qkv = grad_qkv.flatten(0, 1)
        if before is not None:
            output = before.flatten(0, 1)
            grad_qkv, grad_scale = grads_by_output(qkv, grad_qkv, output, implementation=options.implementation)
            self._add_scale(0, grad_scale)
            del output
        del before, grad_heads
        factored = _factored(qkv, kept.products[0], rstd_x)
        grads = grad_product(qkv, grad_qkv, kept.products[0], factored=factored, implementation=options.implementation)
        piece = Piece(options.implementation)
        # Only a weight that is trained, or dropout, reads the normed rows themselves.
        normed_x = self._norm(rows, 0)[0] if self.needs[0] or qkv.rate > 0.0 else None
        self._grads_after_norm(0, grad_qkv, grads, Normed(rows, normed_x, factored), piece)
        del normed_x
        if not self.needs_x and not self.needs_norms[0]:
            return None
        rounded = None if rounded_qkv is None else rounded_qkv[0]
        grad_normed = grad_input(qkv, grad_qkv, grads[0], piece, rounded=rounded)
        return self._norm_backward(0, grad_normed, rows, rstd_x, grad_mid).view_as(self.x)

    def _grad_heads(self, attended: KeptAttention, grad: Tensor, heads: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """Gradients of q, k and v, from that of the attended values [B, T, H · E]."""
        options = self.layout.options
        if options.exchange is None:
            return attended.backward(grad, heads)
        grads = attended.backward(options.exchange.attended_to_heads(grad), heads)
        return options.exchange.queries_to_rows(grads, options.num_kv_heads)

    def _heads(self, kept: Kept) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(q, k and v; the projection's output, which the backward of heads' norms reads, or else None)."""
        before = kept.qkv
        if before is None:
            normed, rounded = self._norm(as_rows(self.x), 0)
            piece = Piece(self.layout.options.implementation)
            before, _ = project(self.projections[0], normed, piece, product=kept.products[0], rounded=rounded)
            before = before.view(*self.x.shape[:2], -1)
        return to_heads(self.layout, self.turn(before)), before if self.turn.norms or self.projections[
            0
        ].scale is not None else None

    def _norm(self, rows: Tensor, index: int) -> tuple[Tensor, Rounded | None]:
        """The normed rows, and the same in fp8 where the projection after the norm reads them so."""
        options = self.layout.options
        rounded = rounded_input(self.projections[2 * index], rows.shape[0], options.implementation)
        normed, _ = norm(rows, self.norms[index], options.epsilons[index], options.implementation, rounded)
        return normed, rounded

    def _norm_backward(
        self,
        index: int,
        grad: Tensor,
        rows: Tensor,
        rstd: Tensor,
        grad_residual: Tensor,
        *,
        rounded: tuple[Rounded, Tensor] | None = None,
    ) -> Tensor:
        grad_rows, grad_weight = norm_backward(
            grad,
            grad_residual,
            rows,
            self.norms[index],
            rstd,
            needs_weight=self.needs_norms[index],
            implementation=self.layout.options.implementation,
            rounded=rounded,
        )
        before = self.norm_grads[index]
        self.norm_grads[index] = grad_weight if before is None or grad_weight is None else before + grad_weight
        return grad_rows

    def _feed_forward(self, grad: Tensor, mid: Tensor, kept: Kept) -> tuple[Tensor, Rounded | None]:
        """Gradient of `mid` [N, D] from that of the output, the residual's share in it; a tile at a time.

        The same in fp8 where `out` reads it so and it is made at once.
        """
        pieces = tiles(mid.shape[0], self.layout.options)
        self.num_tiles = len(pieces)
        if len(pieces) == 1:
            rounded = self._room(1, mid.shape[0])
            grad_mid = self._feed_forward_tile(grad, mid, kept, pieces[0], rounded=rounded)
            return grad_mid, None if rounded is None else rounded[0]
        grad_mid = torch.empty_like(mid)
        for tile in pieces:
            grad_mid[tile] = self._feed_forward_tile(grad[tile], mid[tile], kept, tile)
        return grad_mid, None

    def _feed_forward_tile(
        self, grad: Tensor, mid: Tensor, kept: Kept, tile: slice, *, rounded: tuple[Rounded, Tensor] | None = None
    ) -> Tensor:
        """The same for the rows of a tile, and the gradients of `gate_up`, `down` and the norm."""
        _, _, gate_up, down = self.projections
        implementation, rstd = self.layout.options.implementation, kept.rstds[1][tile]
        piece = Piece(implementation, tile.start)
        product, product_down = (None if x is None else x[tile] for x in kept.products[2:])
        values = kept.gate_up
        needs_normed = values is None or self.needs[8] or gate_up.rate > 0.0
        normed, rounded_normed = self._norm(mid, 1) if needs_normed else (None, None)
        if values is None and normed is not None:
            values, _ = project(gate_up.unscaled, normed, piece, product=product, rounded=rounded_normed)
        del rounded_normed
        if values is None:
            raise RuntimeError("block: neither gate_up's output nor what makes it was kept")
        grad_output = grad_unscaled(down, grad, implementation=implementation)
        grad_down, grad_b = grad_product(down, grad_output, product_down, implementation=implementation)
        self._add(4 * 3 + 3, grad_b)
        grad_activated = grad_input(down, grad_output, grad_down, piece)
        room = self._room(2, mid.shape[0])
        grad_gate_up, activated = self._gated_backward(values, grad_activated, room)
        _, grad_scale = grads_by_input(down, grad, activated, product_down, piece, only_scale=True)
        self._add_scale(3, grad_scale)
        self._weight_grads(3, grad_output, activated, grad_down, piece)
        factored = _factored(gate_up, product, rstd)
        grads = grad_product(gate_up, grad_gate_up, product, factored=factored, implementation=implementation)
        del grad_activated, activated, grad_output
        self._grads_after_norm(2, grad_gate_up, grads, Normed(mid, normed, factored), piece)
        del normed
        grad_normed = grad_input(gate_up, grad_gate_up, grads[0], piece, rounded=None if room is None else room[0])
        return self._norm_backward(1, grad_normed, mid, rstd, grad, rounded=rounded)

    def _room(self, index: int, num_rows: int) -> tuple[Rounded, Tensor] | None:
        """Room for a projection's gradient in fp8 and the factor of its columns, where `grad_input` reads it so."""
        implementation = self.layout.options.implementation
        factor = gradient_factor(self.projections[index], implementation)
        room = rounded_gradient(self.projections[index], num_rows, implementation)
        return None if room is None or factor is None else (room, factor)

    def _gated_backward(
        self, values: Tensor, grad: Tensor, room: tuple[Rounded, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(gradient of what the projection gave, also in fp8 where there is room for it; the activation).

        Both are written over the arguments.
        """
        options, gate_up = self.layout.options, self.projections[2]
        if gate_up.scale is not None:
            kernels = {"activation": options.activation, "implementation": options.implementation}
            grad_z, activated, grad_scale = gated_scaled_backward(values, grad, gate_up.scale, gate_up.bias, **kernels)
            self._add_scale(2, grad_scale)
            return grad_z, activated
        if room is not None:
            return gated_rounded_backward(values, grad, *room, activation=options.activation)
        return glu.gated_backward(values, grad, activation=options.activation, implementation=options.implementation)

    def _grads_after_norm(
        self,
        index: int,
        grad: Tensor,
        grads: tuple[Tensor | None, Tensor | None],
        source: Normed,
        piece: Piece,
    ) -> None:
        """Adds the gradients of a projection of normed rows, which without dropout need not be there.

        `grads`: its dP and dB.

        With normed = r · x · w the gradient of A, dPᵀ normed, is ((r · dP)ᵀ x) · w: x itself is read, and the norm is
        not computed again.
        """
        grad_p, grad_b = grads
        self._add(4 * index + 3, grad_b)
        if self.projections[index].rate > 0.0:
            self._weight_grads(index, grad, source.normed, grad_p, piece)
            return
        self._weight_grads(index, grad, source.normed, None, piece)
        if grad_p is not None and source.factored is not None:
            product = source.factored[1].t() @ source.rows
            weight = self.norms[index // 2]
            self._add(4 * index + 2, scale_columns(product, weight, implementation=piece.implementation))

    def _projection(
        self, index: int, grad: Tensor, x: Tensor, product: Tensor | None, *, rounded: Rounded | None = None
    ) -> Tensor:
        """Gradient of a projection's input x [N, in], and the gradients of its tensors; `rounded`: `grad` in fp8."""
        projection, piece = self.projections[index], Piece(self.layout.options.implementation)
        grad, grad_scale = grads_by_input(projection, grad, x, product, piece)
        self._add_scale(index, grad_scale)
        grad_p, grad_b = grad_product(projection, grad, product, implementation=piece.implementation)
        self._add(4 * index + 3, grad_b)
        self._weight_grads(index, grad, x, grad_p, piece)
        return grad_input(projection, grad, grad_p, piece, rounded=rounded)

    def _weight_grads(self, index: int, grad: Tensor, x: Tensor | None, grad_p: Tensor | None, piece: Piece) -> None:
        """Adds the gradients of weight and bias that are needed, and that of A where dP and the input are given."""
        first = 4 * index
        if self.needs[first] and x is not None:
            self._add_product(first, grad, x)
        if self.needs[first + 1]:
            scale, total = self.projections[index].scale, grad.sum(0, dtype=torch.float32)
            self._add(first + 1, total if scale is None else total / scale)
        if grad_p is not None and x is not None:
            self._add(first + 2, grad_a(self.projections[index], x, grad_p, piece))

    def _add_product(self, index: int, grad: Tensor, x: Tensor) -> None:
        """Adds gradᵀ x [out, in], a weight's gradient, of all tokens or of a tile's.

        Of two tiles the second product adds to the first, in fp32 inside of itself: one rounding more than a product
        over all tokens, and the sum of two rounded ones would be one more again, in passes of their own. Of more, the
        sum so far is kept in fp32.
        """
        before = self.grads[index]
        if before is not None and self.num_tiles == 2:
            before.addmm_(grad.t(), x)
        else:
            self._add(index, grad.t() @ x)

    def _add_scale(self, index: int, grad: Tensor | None) -> None:
        """The same for a projection's scale, whose gradient is in fp32."""
        before = self.scale_grads[index]
        self.scale_grads[index] = grad if before is None or grad is None else before + grad

    def _add(self, index: int, grad: Tensor | None) -> None:
        """Adds to the gradient of a tensor: once, or once a tile."""
        before = self.grads[index]
        # The sum over tiles is taken in fp32, as one matmul over all tokens would.
        self.grads[index] = grad if before is None or grad is None else before.float().add_(grad)
