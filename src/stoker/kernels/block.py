"""One decoder layer with its backward written out: attention and gated feed-forward, pre-norm, frozen or trained base.

    m = x + out(attend(turn(qkv(norm₁(x)))))          y = m + down(gated(gate_up(norm₂(m))))

`turn` rotates queries and keys, which may be normed head by head before.

Autograd, op by op, would keep what elementwise work can rebuild, and checkpointing a layer would run all of it again.
Here the layer itself decides what is kept. Bytes are for N tokens of width D in a two-byte dtype, S = H + 2K heads of E
channels, F the feed-forward's width; rows of statistics and LoRA's N r products are always kept and are tiny.

    keep          kept beside x                                bytes              run again in the backward
    "all"         rotated q, k, v; attended; m; gate_up        2N (SE+HE+D+2F)    norms
    "mixer"       rotated q, k, v; attended; m                 2N (SE+HE+D)       norms, gate_up
    "attention"   attended and its statistics                  2N HE              norms, qkv, rotation, out, gate_up
    "input"       nothing                                      0                  the same and attention

Where heads are normed, or DoRA scales them, the first two rungs keep q, k and v as the projection gave them instead,
and turn them again. With DoRA the backward runs `out` and `down` again for the gradient of their magnitudes.

No rung runs `down` or the activation again for their own sake: the backward reads only what goes into them, and
the activation's backward writes it on the way. Every tensor of the result is the same bit for bit on all rungs, as
long as the matmuls are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels import glu, head_norm, rms_norm, rope
from stoker.kernels.attention import DocumentLengths, attention
from stoker.kernels.feed_forward import KEEP, BlockOptions, feed_forward, tiles
from stoker.kernels.kept_attention import Attend, KeptAttention
from stoker.kernels.offload import HostOffload
from stoker.kernels.projection import (
    FrozenMatrix,
    Piece,
    Projection,
    grad_a,
    grad_input,
    grad_product,
    grad_scale,
    grad_scale_of_input,
    grad_unscaled,
    product_of,
    project,
    project_onto,
)
from stoker.kernels.triton_support import as_rows

__all__ = ["KEEP", "BlockOptions", "BlockWeights", "block"]


class BlockWeights(NamedTuple):
    """What a layer computes with."""

    attention_norm: Tensor
    feed_forward_norm: Tensor
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    weights: BlockWeights,
    options: BlockOptions,
    document_lengths: DocumentLengths | None = None,
) -> Tensor:
    """Returns the layer's output, [B, T, D] like `x`; cos and sin [1 or B, T, E/2] are the rotation's tables.

    Gradients of `x` and of every tensor in `weights` that requires one. Everything, the residual stream included, is in
    the dtype of `x`, or in autocast's where it is on. The backward may run once (RuntimeError at a second time): it
    writes gradients over what the forward kept.
    """
    projections = (weights.qkv, weights.out, weights.gate_up, weights.down)
    tensors: list[Tensor | None] = []
    for projection in projections:
        weight = projection.weight
        tensors += [weight if isinstance(weight, Tensor) else None, projection.bias, projection.a, projection.b]
    # What autograd is given as arguments must not be held a second time.
    fixed = tuple(
        _Fixed(
            None if isinstance(projection.weight, Tensor) else projection.weight,
            projection.scaling,
            projection.slices,
            projection.rate,
            projection.seed,
        )
        for projection in projections
    )
    layout = _Layout(fixed, options, document_lengths)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if not torch.is_grad_enabled():  # nothing will ask for what would be kept
        layout = layout._replace(options=replace(options, keep="input", offload=None))
    with torch.autocast(device, enabled=False):
        norms = (weights.attention_norm, weights.feed_forward_norm, weights.q_norm, weights.k_norm)
        scales = tuple(projection.scale for projection in projections)
        return _Block.apply(x, cos, sin, layout, *norms, *scales, *tensors)


class _Fixed(NamedTuple):
    """What a projection has besides tensors."""

    weight: FrozenMatrix | None
    scaling: float
    slices: tuple[slice, ...]
    rate: float
    seed: int


class _Layout(NamedTuple):
    """What is not a tensor: projections without theirs, options, documents."""

    projections: tuple[_Fixed, ...]
    options: BlockOptions
    document_lengths: DocumentLengths | None


def _projections(
    layout: _Layout, scales: Sequence[Tensor | None], tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Projection]:
    """The four projections with their tensors, which are cast to the working dtype."""
    result = []
    for index, fixed in enumerate(layout.projections):
        weight, bias, a, b = (None if x is None else x.to(dtype) for x in tensors[4 * index : 4 * index + 4])
        matrix = fixed.weight if weight is None else weight
        if matrix is None:
            raise ValueError("a projection has no weight")
        result.append(Projection(matrix, bias, a, b, *fixed[1:], scales[index]))
    return result


def _narrowed(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The tensors with adapters in the working dtype, cast in one launch and once for forward and backward.

    Weights and biases stay as they are: a second copy of a trained weight would be large.
    """
    result = list(tensors)
    wide = [i for i, t in enumerate(tensors) if t is not None and i % 4 >= 2 and t.dtype != dtype]
    sources = [t.detach() for i in wide if (t := tensors[i]) is not None]
    if sources:
        copies = [torch.empty_like(t, dtype=dtype) for t in sources]
        torch._foreach_copy_(copies, sources)
        for index, copy in zip(wide, copies, strict=True):
            result[index] = copy
    return tuple(result)


class _Kept(NamedTuple):
    """What the forward leaves for the backward; None where the rung drops it."""

    mid: Tensor | None
    gate_up: Tensor | None
    rstds: tuple[Tensor, Tensor]
    products: tuple[Tensor | None, ...]
    qkv: Tensor | None


class _Normed(NamedTuple):
    """Rows before a norm, their rstd, and the normed rows where something needs them."""

    rows: Tensor
    rstd: Tensor
    normed: Tensor | None


class _Block(torch.autograd.Function):
    """The layer; see the module's docstring."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: _Layout,
        attention_norm: Tensor,
        feed_forward_norm: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """x: [B, T, D]; tensors: the scale of each projection, then weight, bias, a and b of each."""
        scales, tensors = tensors[:4], tensors[4:]
        options = layout.options
        dtypes = [None if t is None else t.dtype for t in tensors]
        tensors = _narrowed(tensors, x.dtype)
        projections = _projections(layout, scales, tensors, x.dtype)
        rows = as_rows(x)
        normed, rstd_x = _norm(rows, attention_norm, options.epsilons[0], options.implementation)
        turn = _Turn(options, (cos, sin), q_norm, k_norm)
        qkv, product_qkv = project(projections[0], normed, Piece(options.implementation))
        qkv = qkv.view(*x.shape[:2], -1)
        heads = _to_heads(layout, turn(qkv))
        keeps_qkv = turn.norms or scales[0] is not None
        kept_qkv = qkv if keeps_qkv and options.keep in ("all", "mixer") else None
        del qkv
        attended = None
        if options.keep == "input":
            values = _attend(layout)(*heads)
        else:
            forget = options.keep == "attention" or keeps_qkv
            attended = KeptAttention(_attend(layout), heads, forget=forget, offload=options.offload)
            values = attended.values()
        out, values = projections[1], _to_rows(layout, values)
        product_out = product_of(out, values, Piece(options.implementation))
        mid = project_onto(out, values, rows, product_out, implementation=options.implementation)
        if attended is not None:
            attended.put_away()
        normed, rstd_mid = _norm(mid, feed_forward_norm, options.epsilons[1], options.implementation)
        del heads, values
        output, kept_gate_up, product_gate_up, product_down = feed_forward(projections, normed, mid, options)
        kept_mid = mid if options.keep in ("all", "mixer") else None
        products = (product_qkv, product_out, product_gate_up, product_down)
        ctx.attended = attended
        away, held = _put_away((x, kept_qkv), options.offload)
        norms = (attention_norm, feed_forward_norm, q_norm, k_norm)
        ctx.layout, ctx.ran, ctx.away = layout, False, away
        ctx.dtypes = (
            *(None if norm is None else norm.dtype for norm in norms),
            *(None if scale is None else scale.dtype for scale in scales),
            *dtypes,
        )
        kept = (kept_mid, kept_gate_up, rstd_x, rstd_mid, *products)
        ctx.save_for_backward(*held, cos, sin, *norms, *scales, *kept, *tensors)
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x and of the tensors that need one."""
        if ctx.ran:
            raise RuntimeError("block: its backward ran already, and what it needs was overwritten")
        ctx.ran = True
        x, qkv, cos, sin, *rest = ctx.saved_tensors
        norms, scales, kept, tensors = rest[:4], rest[4:8], rest[8:16], rest[16:]
        offload = ctx.layout.options.offload
        x, qkv = (
            held if handle is None else offload.fetch(handle) for held, handle in zip((x, qkv), ctx.away, strict=True)
        )
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        run = _Backward(ctx.layout, norms, scales, tensors, needs, x, (cos, sin))
        attended, ctx.attended = ctx.attended, None
        grad_x = run(grads[0], attended, _Kept(kept[0], kept[1], (kept[2], kept[3]), tuple(kept[4:]), qkv))
        for handle in ctx.away:
            if handle is not None:
                offload.release(handle)
        pairs = zip((*run.norm_grads, *run.scale_grads, *run.grads), ctx.dtypes, strict=True)
        return grad_x, None, None, None, *(None if g is None or d is None else g.to(d) for g, d in pairs)


class _Backward:
    """One run of a layer's backward; `norm_grads` and `grads` are those of the norms' weights and of the tensors."""

    def __init__(  # noqa: PLR0917 - private, the saved tensors as they come
        self,
        layout: _Layout,
        norms: Sequence[Tensor | None],
        scales: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        needs: Sequence[bool],
        x: Tensor,
        tables: tuple[Tensor, Tensor],
    ) -> None:
        self.layout, self.x = layout, x
        self.norms = [norm for norm in norms[:2] if norm is not None]
        self.turn = _Turn(layout.options, tables, *norms[2:])
        self.needs_x, self.needs_norms, self.needs = needs[0], needs[1:5], needs[9:]
        self.projections = _projections(layout, scales, tensors, x.dtype)
        self.scale_grads: list[Tensor | None] = [None] * len(scales)
        self.norm_grads: list[Tensor | None] = [None, None, None, None]
        self.grads: list[Tensor | None] = [None] * len(tensors)

    def __call__(self, grad: Tensor, attended: KeptAttention | None, kept: _Kept) -> Tensor | None:
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
            attended = KeptAttention(_attend(layout), heads)
        mid = kept.mid
        if mid is None:
            values = _to_rows(layout, attended.values())
            mid = project_onto(out, values, rows, kept.products[1], implementation=options.implementation)
            del values
        grad_mid = self._feed_forward(as_rows(grad), mid, kept)
        del mid
        if not heads and (before is not None or options.keep == "attention"):
            heads, before = self._heads(kept)
        grad_attended = self._projection(1, grad_mid, _to_rows(layout, attended.values()), kept.products[1])
        grad_heads = self._grad_heads(attended, grad_attended.view(*self.x.shape[:2], -1), heads)
        del heads, attended, grad_attended
        grad_qkv, *self.norm_grads[2:] = self.turn.backward(grad_heads, before, needs_weights=any(self.needs_norms[2:]))
        grad_qkv = grad_qkv.flatten(0, 1)
        if before is not None:
            self._add_scale(0, grad_scale(qkv, grad_qkv, before.flatten(0, 1)))
        del before, grad_heads
        grad_qkv = grad_unscaled(qkv, grad_qkv)
        grads = grad_product(qkv, grad_qkv, kept.products[0], implementation=options.implementation)
        piece = Piece(options.implementation)
        # Only a weight that is trained, or dropout, reads the normed rows themselves.
        normed_x = self._norm(rows, 0)[0] if self.needs[0] or qkv.rate > 0.0 else None
        self._grads_after_norm(0, grad_qkv, grads, _Normed(rows, rstd_x, normed_x), piece)
        del normed_x
        if not self.needs_x and not self.needs_norms[0]:
            return None
        grad_normed = grad_input(qkv, grad_qkv, grads[0], piece)
        return self._norm_backward(0, grad_normed, rows, rstd_x, grad_mid).view_as(self.x)

    def _grad_heads(self, attended: KeptAttention, grad: Tensor, heads: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """Gradients of q, k and v, from that of the attended values [B, T, H · E]."""
        options = self.layout.options
        if options.exchange is None:
            return attended.backward(grad, heads)
        grads = attended.backward(options.exchange.attended_to_heads(grad), heads)
        return options.exchange.queries_to_rows(grads, options.num_kv_heads)

    def _heads(self, kept: _Kept) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(q, k and v; the projection's output, which the backward of heads' norms reads, or else None)."""
        before = kept.qkv
        if before is None:
            normed, _ = self._norm(as_rows(self.x), 0)
            piece = Piece(self.layout.options.implementation)
            before, _ = project(self.projections[0], normed, piece, product=kept.products[0])
            before = before.view(*self.x.shape[:2], -1)
        return _to_heads(self.layout, self.turn(before)), before if self.turn.norms or self.projections[
            0
        ].scale is not None else None

    def _norm(self, rows: Tensor, index: int) -> tuple[Tensor, Tensor]:
        options = self.layout.options
        return _norm(rows, self.norms[index], options.epsilons[index], options.implementation)

    def _norm_backward(self, index: int, grad: Tensor, rows: Tensor, rstd: Tensor, grad_residual: Tensor) -> Tensor:
        grad_rows, grad_weight = _norm_backward(
            grad,
            grad_residual,
            rows,
            self.norms[index],
            rstd,
            needs_weight=self.needs_norms[index],
            implementation=self.layout.options.implementation,
        )
        before = self.norm_grads[index]
        self.norm_grads[index] = grad_weight if before is None or grad_weight is None else before + grad_weight
        return grad_rows

    def _feed_forward(self, grad: Tensor, mid: Tensor, kept: _Kept) -> Tensor:
        """Gradient of `mid` [N, D] from that of the output, the residual's share in it; a tile at a time."""
        pieces = tiles(mid.shape[0], self.layout.options)
        if len(pieces) == 1:
            return self._feed_forward_tile(grad, mid, kept, pieces[0])
        grad_mid = torch.empty_like(mid)
        for tile in pieces:
            grad_mid[tile] = self._feed_forward_tile(grad[tile], mid[tile], kept, tile)
        return grad_mid

    def _feed_forward_tile(self, grad: Tensor, mid: Tensor, kept: _Kept, tile: slice) -> Tensor:
        """The same for the rows of a tile, and the gradients of `gate_up`, `down` and the norm."""
        _, _, gate_up, down = self.projections
        implementation, rstd = self.layout.options.implementation, kept.rstds[1][tile]
        piece = Piece(implementation, tile.start)
        product, product_down = (None if x is None else x[tile] for x in kept.products[2:])
        values = kept.gate_up
        needs_normed = values is None or self.needs[8] or gate_up.rate > 0.0
        normed = self._norm(mid, 1)[0] if needs_normed else None
        if values is None and normed is not None:
            values, _ = project(gate_up, normed, piece, product=product)
        if values is None:
            raise RuntimeError("block: neither gate_up's output nor what makes it was kept")
        grad_output = grad_unscaled(down, grad)
        grad_down, grad_b = grad_product(down, grad_output, product_down, implementation=implementation)
        self._add(4 * 3 + 3, grad_b)
        grad_activated = grad_input(down, grad_output, grad_down, piece)
        # The activation's backward writes over its input, which DoRA's reads afterwards.
        before = values.clone() if gate_up.scale is not None else None
        grad_gate_up, activated = glu.gated_backward(
            values, grad_activated, activation=self.layout.options.activation, implementation=implementation
        )
        self._add_scale(3, grad_scale_of_input(down, grad, activated, product_down, piece))
        if before is not None:
            self._add_scale(2, grad_scale(gate_up, grad_gate_up, before))
        grad_gate_up = grad_unscaled(gate_up, grad_gate_up)
        self._weight_grads(3, grad_output, activated, grad_down, piece)
        grads = grad_product(gate_up, grad_gate_up, product, implementation=implementation)
        del grad_activated, activated, before, grad_output
        self._grads_after_norm(2, grad_gate_up, grads, _Normed(mid, rstd, normed), piece)
        del normed
        return self._norm_backward(1, grad_input(gate_up, grad_gate_up, grads[0], piece), mid, rstd, grad)

    def _grads_after_norm(
        self,
        index: int,
        grad: Tensor,
        grads: tuple[Tensor | None, Tensor | None],
        source: _Normed,
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
        if grad_p is not None:
            scaled = (grad_p * source.rstd[:, None]).to(grad_p.dtype)
            self._add(4 * index + 2, (scaled.t() @ source.rows) * self.norms[index // 2].float())

    def _projection(self, index: int, grad: Tensor, x: Tensor, product: Tensor | None) -> Tensor:
        """Gradient of a projection's input x [N, in], and the gradients of its tensors."""
        projection, piece = self.projections[index], Piece(self.layout.options.implementation)
        self._add_scale(index, grad_scale_of_input(projection, grad, x, product, piece))
        grad = grad_unscaled(projection, grad)
        grad_p, grad_b = grad_product(projection, grad, product, implementation=piece.implementation)
        self._add(4 * index + 3, grad_b)
        self._weight_grads(index, grad, x, grad_p, piece)
        return grad_input(projection, grad, grad_p, piece)

    def _weight_grads(self, index: int, grad: Tensor, x: Tensor | None, grad_p: Tensor | None, piece: Piece) -> None:
        """Adds the gradients of weight and bias that are needed, and that of A where dP and the input are given."""
        first = 4 * index
        if self.needs[first] and x is not None:
            self._add(first, grad.t() @ x)
        if self.needs[first + 1]:
            scale, total = self.projections[index].scale, grad.sum(0, dtype=torch.float32)
            self._add(first + 1, total if scale is None else total / scale)
        if grad_p is not None and x is not None:
            self._add(first + 2, grad_a(self.projections[index], x, grad_p, piece))

    def _add_scale(self, index: int, grad: Tensor | None) -> None:
        """The same for a projection's scale, whose gradient is in fp32."""
        before = self.scale_grads[index]
        self.scale_grads[index] = grad if before is None or grad is None else before + grad

    def _add(self, index: int, grad: Tensor | None) -> None:
        """Adds to the gradient of a tensor: once, or once a tile."""
        before = self.grads[index]
        # The sum over tiles is taken in fp32, as one matmul over all tokens would.
        self.grads[index] = grad if before is None or grad is None else before.float() + grad


def _attend(layout: _Layout) -> Attend:
    """Attention by the layout's documents, window and kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = layout.options
        attended = attention(
            q,
            k,
            v,
            document_lengths=layout.document_lengths,
            window=options.window,
            scale=options.scale,
            implementation=options.implementation,
        )
        return attended.flatten(2)

    return attend


def _to_heads(layout: _Layout, heads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v as attention takes them: of whole rows, where ranks share rows."""
    exchange = layout.options.exchange
    return heads if exchange is None else exchange.queries_to_heads(*heads)


def _to_rows(layout: _Layout, attended: Tensor) -> Tensor:
    """Attended values as the output projection takes them [N, H · E]: of this rank's part, where ranks share rows.

    They are sent anew wherever they are wanted: kept beside those that attention keeps they would be there twice.
    """
    exchange = layout.options.exchange
    return (attended if exchange is None else exchange.attended_to_rows(attended)).flatten(0, 1)


class _Turn:
    """What happens to queries and keys between projection and attention: norms of heads where there are, a rotation."""

    def __init__(
        self, options: BlockOptions, tables: tuple[Tensor, Tensor], q_norm: Tensor | None, k_norm: Tensor | None
    ) -> None:
        self._options, self._tables = options, tables
        self._weights = None if q_norm is None or k_norm is None else (q_norm, k_norm)

    @property
    def norms(self) -> bool:
        """Whether heads are normed, so that the backward needs what the projection gave."""
        return self._weights is not None

    def __call__(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [B, T, heads, E] of the projection's output [B, T, (H + 2K) · E]."""
        options = self._options
        sizes = {"num_heads": options.num_heads, "num_kv_heads": options.num_kv_heads}
        if self._weights is not None:
            return head_norm.norm_split_and_rotate(
                qkv,
                *self._weights,
                *self._tables,
                epsilon=options.head_epsilon,
                **sizes,
                implementation=options.implementation,
            )
        return rope.split_and_rotate(
            qkv, *self._tables, **sizes, interleaved=options.interleaved, implementation=options.implementation
        )

    def backward(
        self, grads: Sequence[Tensor], qkv: Tensor | None, *, needs_weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the projection's output and of the norms' weights, from those of q, k and v."""
        options = self._options
        if self._weights is None or qkv is None:
            interleaved, implementation = options.interleaved, options.implementation
            grad = rope.split_and_rotate_backward(
                grads, *self._tables, interleaved=interleaved, implementation=implementation
            )
            return grad, None, None
        return head_norm.norm_split_and_rotate_backward(
            grads,
            qkv,
            *self._weights,
            *self._tables,
            epsilon=options.head_epsilon,
            needs_weights=needs_weights,
            implementation=options.implementation,
        )


def _put_away(
    tensors: Sequence[Tensor | None], offload: HostOffload | None
) -> tuple[tuple[int | None, ...], tuple[Tensor | None, ...]]:
    """For each tensor a handle, if it waits on the host, or else the tensor itself."""
    handles = tuple(
        offload.store(x.detach()) if x is not None and offload is not None and offload.takes(x) else None
        for x in tensors
    )
    return handles, tuple(x if handle is None else None for x, handle in zip(tensors, handles, strict=True))


def _norm(x: Tensor, weight: Tensor, epsilon: float, implementation: str) -> tuple[Tensor, Tensor]:
    """(norm of x, its rstd) for rows x [N, D]."""
    if implementation == "triton":
        normed, _, rstd = rms_norm.launch_forward(x, None, weight, epsilon)
        return normed, rstd
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + epsilon)
    return rms_norm.rms_norm_reference(x, weight, epsilon), rstd


def _norm_backward(
    grad: Tensor,
    grad_residual: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    needs_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of x with `grad_residual` added, gradient of weight or None)."""
    if implementation == "triton":
        grad_x, grad_weight = rms_norm.launch_backward(
            grad, grad_residual, x, weight, rstd, needs_input=True, needs_weight=needs_weight
        )
        return x if grad_x is None else grad_x, grad_weight
    wide, rstd = x.float(), rstd[:, None]
    scaled = grad.float() * weight.float()
    dot = (scaled * wide).mean(-1, keepdim=True)
    grad_x = grad_residual + (rstd * scaled - rstd.pow(3) * dot * wide)
    grad_weight = (grad.float() * wide * rstd).sum(0) if needs_weight else None
    return grad_x.to(x.dtype), grad_weight
