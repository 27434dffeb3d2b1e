"""One decoder layer with its backward written out: attention and gated feed-forward, pre-norm, frozen or trained base.

    m = x + out(attend(rotate(qkv(norm₁(x)))))          y = m + down(swiglu(gate_up(norm₂(m))))

Autograd, op by op, would keep what elementwise work can rebuild, and checkpointing a layer would run all of it again.
Here the layer itself decides what is kept. Bytes are for N tokens of width D in a two-byte dtype, S = H + 2K heads of E
channels, F the feed-forward's width; rows of statistics and LoRA's N r products are always kept and are tiny.

    keep          kept beside x                                bytes              run again in the backward
    "all"         rotated q, k, v; attended; m; gate_up        2N (SE+HE+D+2F)    norms
    "mixer"       rotated q, k, v; attended; m                 2N (SE+HE+D)       norms, gate_up
    "attention"   attended and its statistics                  2N HE              norms, qkv, rotation, out, gate_up
    "input"       nothing                                      0                  the same and attention

No rung runs `down` or the activation again for their own sake: the backward reads only what goes into them, and
swiglu's backward writes the activation on the way. Every tensor of the result is the same bit for bit on all rungs, as
long as the matmuls are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels import glu, rms_norm, rope
from stoker.kernels.attention import DocumentLengths, attention
from stoker.kernels.offload import HostOffload, is_dense
from stoker.kernels.triton_support import as_rows

KEEP = ("all", "mixer", "attention", "input")


class FrozenMatrix(Protocol):
    """A weight kept in some other form than a tensor (see the quant room)."""

    def matmul(self, x: Tensor) -> Tensor:
        """Returns `x @ W.T`."""
        ...

    def matmul_transposed(self, grad: Tensor) -> Tensor:
        """Returns `grad @ W`."""
        ...


class Projection(NamedTuple):
    """A linear layer `[in]` to `[out]`, with low-rank updates of the rows in `slices` when `a` is there.

    `weight` `[out, in]`, `bias` `[out]` or None, `a` `[n r, in]`, `b` `[sum of the slices' sizes, r]`.
    """

    weight: Tensor | FrozenMatrix
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    slices: tuple[slice, ...] = ()


class BlockWeights(NamedTuple):
    """What a layer computes with."""

    attention_norm: Tensor
    feed_forward_norm: Tensor
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection


@dataclass(frozen=True)
class BlockOptions:
    """How a layer computes: heads, the norms' epsilons, the sliding window, the kernels, and what it keeps (KEEP).

    With `offload`, x and what attention keeps wait on the host for the backward.
    """

    num_heads: int
    num_kv_heads: int
    epsilons: tuple[float, float]
    window: int | None = None
    implementation: str = "reference"
    keep: str = "all"
    offload: HostOffload | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ValueError(f"keep = {self.keep!r}; allowed: {', '.join(KEEP)}")


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
            None if isinstance(projection.weight, Tensor) else projection.weight, projection.scaling, projection.slices
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
        return _Block.apply(x, cos, sin, layout, weights.attention_norm, weights.feed_forward_norm, *tensors)


class _Fixed(NamedTuple):
    """What a projection has besides tensors."""

    weight: FrozenMatrix | None
    scaling: float
    slices: tuple[slice, ...]


class _Layout(NamedTuple):
    """What is not a tensor: projections without theirs, options, documents."""

    projections: tuple[_Fixed, ...]
    options: BlockOptions
    document_lengths: DocumentLengths | None


def _projections(layout: _Layout, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Projection]:
    """The four projections with their tensors, which are cast to the working dtype."""
    result = []
    for index, fixed in enumerate(layout.projections):
        weight, bias, a, b = (None if x is None else x.to(dtype) for x in tensors[4 * index : 4 * index + 4])
        matrix = fixed.weight if weight is None else weight
        if matrix is None:
            raise ValueError("a projection has no weight")
        result.append(Projection(matrix, bias, a, b, fixed.scaling, fixed.slices))
    return result


def _project(projection: Projection, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [N, in] to (output [N, out], x Aᵀ [N, n r] or None)."""
    weight = projection.weight
    output = x @ weight.t() if isinstance(weight, Tensor) else weight.matmul(x)
    if projection.bias is not None:
        output += projection.bias
    if projection.a is None or projection.b is None:
        return output, None
    product = x @ projection.a.t()
    return _add_updates(projection, output, product), product


def _add_updates(projection: Projection, output: Tensor, product: Tensor) -> Tensor:
    for rows, part, b in _parts(projection, product):
        output[:, rows].addmm_(part, b.t(), alpha=projection.scaling)
    return output


def _parts(projection: Projection, product: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
    """For each adapted part: its columns of the output, its columns of `product`, its rows of b."""
    b = projection.b
    if b is None:
        return []
    sizes = [rows.stop - rows.start for rows in projection.slices]
    return list(zip(projection.slices, product.split(b.shape[1], dim=1), b.split(sizes), strict=True))


def _grad_product(projection: Projection, grad: Tensor, product: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(dP [N, n r], dB) of a projection with adapters, from its output's gradient [N, out]."""
    if projection.b is None or product is None:
        return None, None
    grad_product, grad_b = torch.empty_like(product), torch.empty_like(projection.b)
    start = 0
    for (rows, part, b), (_, grad_part, _) in zip(
        _parts(projection, product), _parts(projection, grad_product), strict=True
    ):
        torch.mm(grad[:, rows], b, out=grad_part)
        torch.mm(grad[:, rows].t(), part, out=grad_b[start : start + b.shape[0]])
        start += b.shape[0]
    return grad_product.mul_(projection.scaling), grad_b.mul_(projection.scaling)


def _grad_input(projection: Projection, grad: Tensor, grad_product: Tensor | None) -> Tensor:
    weight = projection.weight
    grad_x = grad @ weight if isinstance(weight, Tensor) else weight.matmul_transposed(grad)
    if grad_product is not None and projection.a is not None:
        grad_x.addmm_(grad_product, projection.a)
    return grad_x


class _Source(torch.autograd.Function):
    """Hands q, k and v to a graph that must not keep them alive, and takes their gradients from it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, sink: list[Tensor], *heads: Tensor) -> tuple[Tensor, ...]:
        del root  # only makes the outputs require gradients
        ctx.sink = sink
        return tuple(x.view_as(x) for x in heads)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        ctx.sink.extend(grads)
        return grads[0].new_zeros(()), None, None, None, None


# Smaller tensors (a row's statistics in attention) are not worth a copy of their own.
MIN_OFFLOAD_BYTES = 2**20


class _Attended:
    """Attention with a graph of its own, from rotated q, k, v to the attended values [B, T, H · E].

    With `forget`, the graph does not hold q, k and v: `backward` is given them anew. What attention keeps besides (its
    output and statistics) stays, or goes to the host where the options have an offload.
    """

    def __init__(
        self, heads: tuple[Tensor, ...], layout: _Layout, *, forget: bool = False, offload: bool = False
    ) -> None:
        self._heads: tuple[Tensor, ...] = ()
        self._sink: list[Tensor] = []
        self._offload = layout.options.offload if offload else None
        self._handles: dict[int, tuple[int, int]] = {}  # of a storage: handle, and where its stored tensor begins
        self._storages = [x.untyped_storage().data_ptr() for x in heads] if forget else []
        self._root = torch.zeros((), dtype=heads[0].dtype, device=heads[0].device, requires_grad=True)
        with torch.enable_grad():
            traced = _Source.apply(self._root, self._sink, *heads)
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                output = _attend(traced, layout)
        self._edge = torch.autograd.graph.get_gradient_edge(output)
        self.output: Tensor | None = output.detach()
        self._view: tuple[int, tuple] | None = None

    def _pack(self, tensor: Tensor) -> Tensor | tuple:
        storage = tensor.untyped_storage().data_ptr()
        if storage in self._storages:
            return self._storages.index(storage), tensor.shape, tensor.stride(), tensor.storage_offset()
        large = tensor.numel() * tensor.element_size() >= MIN_OFFLOAD_BYTES
        if self._offload is None or not large or not is_dense(tensor) or storage in self._handles:
            return tensor
        handle = self._offload.store(tensor.detach())
        self._handles[storage] = (handle, int(tensor.storage_offset()))
        return (handle,)

    def _unpack(self, packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if len(packed) == 1 and self._offload is not None:
            return self._offload.fetch(packed[0])
        index, shape, stride, offset = packed
        return self._heads[index].as_strided(shape, stride, offset)

    def put_away(self) -> None:
        """Drops the output from the device, if it is to wait on the host."""
        if self._offload is None or self.output is None:
            return
        storage, output = self.output.untyped_storage().data_ptr(), self.output
        if storage not in self._handles:  # attention saved another tensor than its output
            if output.numel() * output.element_size() < MIN_OFFLOAD_BYTES:
                return
            self._handles[storage] = (self._offload.store(output.contiguous()), int(output.storage_offset()))
        handle, begin = self._handles[storage]
        self._view = (handle, (output.shape, output.stride(), int(output.storage_offset()) - begin))
        self.output = None

    def values(self) -> Tensor:
        """The output [B, T, H · E], brought back if it was put away."""
        if self.output is not None:
            return self.output
        if self._offload is None or self._view is None:
            raise RuntimeError("the attended values are gone")
        handle, view = self._view
        return self._offload.fetch(handle).as_strided(*view)

    def backward(self, grad: Tensor, heads: tuple[Tensor, ...] = ()) -> list[Tensor]:
        """Gradients of q, k and v, from that of the output; `heads` are they, where they were forgotten."""
        self._heads = heads
        torch.autograd.grad((self._edge,), (self._root,), (grad,))
        self._heads = ()
        if self._offload is not None:
            for handle, _ in self._handles.values():
                self._offload.release(handle)
        return self._sink


def _attend(heads: tuple[Tensor, ...], layout: _Layout) -> Tensor:
    attended = attention(
        *heads,
        document_lengths=layout.document_lengths,
        window=layout.options.window,
        implementation=layout.options.implementation,
    )
    return attended.flatten(2)


class _Kept(NamedTuple):
    """What the forward leaves for the backward; None where the rung drops it."""

    mid: Tensor | None
    gate_up: Tensor | None
    products: tuple[Tensor | None, ...]


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
        *tensors: Tensor | None,
    ) -> Tensor:
        """x: [B, T, D]; tensors: weight, bias, a and b of each projection."""
        options = layout.options
        projections = _projections(layout, tensors, x.dtype)
        rows = as_rows(x)
        normed, _, _ = _norm(rows, None, attention_norm, options.epsilons[0], options.implementation)
        heads, product_qkv = _heads(projections[0], normed, x.shape, (cos, sin), options)
        attended = None
        if options.keep == "input":
            values = _attend(heads, layout)
        else:
            attended = _Attended(heads, layout, forget=options.keep == "attention", offload=True)
            values = attended.values()
        mixed, product_out = _project(projections[1], values.flatten(0, 1))
        if attended is not None:
            attended.put_away()
        normed, mid, _ = _norm(mixed, rows, feed_forward_norm, options.epsilons[1], options.implementation)
        gate_up, product_gate_up = _project(projections[2], normed)
        del heads, values, normed, mixed
        activated = glu.swiglu(gate_up, implementation=options.implementation)
        output, product_down = _project(projections[3], activated)
        output += mid
        kept_mid = mid if options.keep in ("all", "mixer") else None
        kept_gate_up = gate_up if options.keep == "all" else None
        products = (product_qkv, product_out, product_gate_up, product_down)
        ctx.attended = attended
        ctx.x_handle = None
        if options.offload is not None and is_dense(x) and x.numel() * x.element_size() >= MIN_OFFLOAD_BYTES:
            ctx.x_handle = options.offload.store(x.detach())
        ctx.layout, ctx.ran = layout, False
        kept = (kept_mid, kept_gate_up, *products)
        ctx.save_for_backward(
            None if ctx.x_handle is not None else x, cos, sin, attention_norm, feed_forward_norm, *kept, *tensors
        )
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x and of the tensors that need one."""
        if ctx.ran:
            raise RuntimeError("block: its backward ran already, and what it needs was overwritten")
        ctx.ran = True
        x, cos, sin, *rest = ctx.saved_tensors
        norms, kept, tensors = rest[:2], rest[2:8], rest[8:]
        if ctx.x_handle is not None:
            x = ctx.layout.options.offload.fetch(ctx.x_handle)
        run = _Backward(ctx.layout, norms, tensors, ctx.needs_input_grad[4:], x, (cos, sin))
        attended, ctx.attended = ctx.attended, None
        grad_x = run(grads[0], attended, _Kept(kept[0], kept[1], tuple(kept[2:])))
        if ctx.x_handle is not None:
            ctx.layout.options.offload.release(ctx.x_handle)
        pairs = zip((*run.norm_grads, *run.grads), (*norms, *tensors), strict=True)
        return grad_x, None, None, None, *(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


class _Backward:
    """One run of a layer's backward; `norm_grads` and `grads` are those of the norms' weights and of the tensors."""

    def __init__(  # noqa: PLR0917 - private, the saved tensors as they come
        self,
        layout: _Layout,
        norms: Sequence[Tensor],
        tensors: Sequence[Tensor | None],
        needs: Sequence[bool],
        x: Tensor,
        tables: tuple[Tensor, Tensor],
    ) -> None:
        self.layout, self.norms, self.x, self.tables = layout, norms, x, tables
        self.needs_norms, self.needs = needs[:2], needs[2:]
        self.projections = _projections(layout, tensors, x.dtype)
        self.norm_grads: list[Tensor | None] = [None, None]
        self.grads: list[Tensor | None] = [None] * len(tensors)

    def __call__(self, grad: Tensor, attended: _Attended | None, kept: _Kept) -> Tensor:
        """Gradient of x, from that of the output [B, T, D]."""
        options, layout, rows = self.layout.options, self.layout, as_rows(self.x)
        qkv, out, gate_up, _ = self.projections
        normed_x, _, rstd_x = self._norm(rows, 0)
        heads: tuple[Tensor, ...] = ()
        if options.keep in ("attention", "input"):
            heads, _ = _heads(qkv, normed_x, self.x.shape, self.tables, options)
        if attended is None:
            attended = _Attended(heads, layout)
        if kept.mid is None:
            mixed, _ = _project(out, attended.values().flatten(0, 1))
            normed_mid, mid, rstd_mid = self._norm(mixed, 1, residual=rows)
            del mixed
        else:
            normed_mid, mid, rstd_mid = self._norm(kept.mid, 1)
        gate_up_output = _project(gate_up, normed_mid)[0] if kept.gate_up is None else kept.gate_up
        grad_rows = as_rows(grad)
        grad_gate_up = self._feed_forward(grad_rows, gate_up_output, kept.products[3])
        grad_normed = self._projection(2, grad_gate_up, normed_mid, kept.products[2])
        del gate_up_output, grad_gate_up, normed_mid
        grad_mid = self._norm_backward(1, grad_normed, mid, rstd_mid, grad_rows)
        grad_attended = self._projection(1, grad_mid, attended.values().flatten(0, 1), kept.products[1])
        grad_heads = attended.backward(grad_attended.view(*self.x.shape[:2], -1), heads)
        del heads, attended, mid
        grad_qkv = rope.split_and_rotate_backward(grad_heads, *self.tables, implementation=options.implementation)
        grad_normed = self._projection(0, grad_qkv.flatten(0, 1), normed_x, kept.products[0])
        return self._norm_backward(0, grad_normed, rows, rstd_x, grad_mid).view_as(self.x)

    def _norm(self, rows: Tensor, index: int, *, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        options = self.layout.options
        return _norm(rows, residual, self.norms[index], options.epsilons[index], options.implementation)

    def _norm_backward(self, index: int, grad: Tensor, rows: Tensor, rstd: Tensor, grad_residual: Tensor) -> Tensor:
        grad_rows, self.norm_grads[index] = _norm_backward(
            grad,
            grad_residual,
            rows,
            self.norms[index],
            rstd,
            needs_weight=self.needs_norms[index],
            implementation=self.layout.options.implementation,
        )
        return grad_rows

    def _feed_forward(self, grad: Tensor, gate_up: Tensor, product: Tensor | None) -> Tensor:
        """Gradient of gate_up, in its place, and the gradients of `down`."""
        down = self.projections[3]
        grad_product, self.grads[4 * 3 + 3] = _grad_product(down, grad, product)
        grad_activated = _grad_input(down, grad, grad_product)
        grad_gate_up, activated = glu.swiglu_backward(
            gate_up, grad_activated, implementation=self.layout.options.implementation
        )
        self._weight_grads(3, grad, activated, grad_product)
        return grad_gate_up

    def _projection(self, index: int, grad: Tensor, x: Tensor, product: Tensor | None) -> Tensor:
        """Gradient of a projection's input x [N, in], and the gradients of its tensors."""
        projection = self.projections[index]
        grad_product, self.grads[4 * index + 3] = _grad_product(projection, grad, product)
        self._weight_grads(index, grad, x, grad_product)
        return _grad_input(projection, grad, grad_product)

    def _weight_grads(self, index: int, grad: Tensor, x: Tensor, grad_product: Tensor | None) -> None:
        first = 4 * index
        if self.needs[first]:
            self.grads[first] = grad.t() @ x
        if self.needs[first + 1]:
            self.grads[first + 1] = grad.sum(0, dtype=torch.float32)
        if grad_product is not None:
            self.grads[first + 2] = grad_product.t() @ x


def _heads(
    projection: Projection,
    normed: Tensor,
    shape: torch.Size,
    tables: tuple[Tensor, Tensor],
    options: BlockOptions,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Rotated q, k and v [B, T, heads, E] of normed rows [B · T, D], and the adapters' product."""
    qkv, product = _project(projection, normed)
    heads = rope.split_and_rotate(
        qkv.view(*shape[:2], -1),
        *tables,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        implementation=options.implementation,
    )
    return heads, product


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm of residual + x, that sum, its rstd) for rows x [N, D]."""
    if implementation == "triton":
        return rms_norm.launch_forward(x, residual, weight, epsilon)
    total = x if residual is None else residual + x
    rstd = torch.rsqrt(total.float().pow(2).mean(-1) + epsilon)
    return rms_norm.rms_norm_reference(total, weight, epsilon), total, rstd


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
