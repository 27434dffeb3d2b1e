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
and turn them again. With DoRA gate_up is kept as its product gave it, before its factors, and the backward runs `out`
and `down` again for the gradient of their magnitudes.

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

from stoker.kernels.block_backward import Backward, Kept
from stoker.kernels.block_parts import Fixed, Layout, Turn, attend_by, norm, projections_of, to_heads, to_rows
from stoker.kernels.documents import DocumentLengths
from stoker.kernels.feed_forward import KEEP, BlockOptions, feed_forward
from stoker.kernels.kept_attention import KeptAttention
from stoker.kernels.offload import HostOffload
from stoker.kernels.projection import Piece, Projection, product_of, project, project_onto, rounded_input
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
        Fixed(
            None if isinstance(projection.weight, Tensor) else projection.weight,
            projection.scaling,
            projection.slices,
            projection.rate,
            projection.seed,
        )
        for projection in projections
    )
    layout = Layout(fixed, options, document_lengths)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if not torch.is_grad_enabled():  # nothing will ask for what would be kept
        layout = layout._replace(options=replace(options, keep="input", offload=None))
    with torch.autocast(device, enabled=False):
        norms = (weights.attention_norm, weights.feed_forward_norm, weights.q_norm, weights.k_norm)
        scales = tuple(projection.scale for projection in projections)
        return _Block.apply(x, cos, sin, layout, *norms, *scales, *tensors)


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


class _Block(torch.autograd.Function):
    """The layer; see the module's docstring."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
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
        projections = projections_of(layout, scales, tensors, x.dtype)
        rows = as_rows(x)
        rounded = rounded_input(projections[0], rows.shape[0], options.implementation)
        normed, rstd_x = norm(rows, attention_norm, options.epsilons[0], options.implementation, rounded)
        turn = Turn(options, (cos, sin), q_norm, k_norm)
        qkv, product_qkv = project(projections[0], normed, Piece(options.implementation), rounded=rounded)
        qkv = qkv.view(*x.shape[:2], -1)
        heads = to_heads(layout, turn(qkv))
        keeps_qkv = turn.norms or scales[0] is not None
        kept_qkv = qkv if keeps_qkv and options.keep in ("all", "mixer") else None
        del qkv, rounded
        attended = None
        if options.keep == "input":
            values = attend_by(layout)(*heads)
        else:
            forget = options.keep == "attention" or keeps_qkv
            attended = KeptAttention(attend_by(layout), heads, forget=forget, offload=options.offload)
            values = attended.values()
        out, values = projections[1], to_rows(layout, values)
        product_out = product_of(out, values, Piece(options.implementation))
        mid = project_onto(out, values, rows, product_out, implementation=options.implementation)
        if attended is not None:
            attended.put_away()
        rounded = rounded_input(projections[2], rows.shape[0], options.implementation)
        normed, rstd_mid = norm(mid, feed_forward_norm, options.epsilons[1], options.implementation, rounded)
        del heads, values
        output, kept_gate_up, product_gate_up, product_down = feed_forward(
            projections, normed, mid, options, rounded=rounded
        )
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
        run = Backward(ctx.layout, norms, scales, tensors, needs, x, (cos, sin))
        attended, ctx.attended = ctx.attended, None
        grad_x = run(grads[0], attended, Kept(kept[0], kept[1], (kept[2], kept[3]), tuple(kept[4:]), qkv))
        for handle in ctx.away:
            if handle is not None:
                offload.release(handle)
        pairs = zip((*run.norm_grads, *run.scale_grads, *run.grads), ctx.dtypes, strict=True)
        return grad_x, None, None, None, *(None if g is None or d is None else g.to(d) for g, d in pairs)


def _put_away(
    tensors: Sequence[Tensor | None], offload: HostOffload | None
) -> tuple[tuple[int | None, ...], tuple[Tensor | None, ...]]:
    """For each tensor a handle, if it waits on the host, or else the tensor itself."""
    handles = tuple(
        offload.store(x.detach()) if x is not None and offload is not None and offload.takes(x) else None
        for x in tensors
    )
    return handles, tuple(x if handle is None else None for x, handle in zip(tensors, handles, strict=True))
