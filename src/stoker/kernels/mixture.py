"""A mixture of experts as one operation: routed rows through two products with low-rank updates, and its backward.

With tokens x [N, D], their chosen experts and weights w [N, k], and rows m sorted by expert (`routed_rows`), of token
t(m) and expert e(m):

    P = x[t] A_guᵀ      Z = x[t] W_guᵀ + c_gu + s P B_guᵀ      H = gate(Z)
    Q = H A_dᵀ          Y = H W_dᵀ + c_d + s Q B_dᵀ            y[t] = Σ w Y

    dQ = s dy[t] B_d    dH = dy[t] W_d + dQ A_d               dw = dH · H + dy[t] · c_d
    dA_d = dQᵀ (w H)    dB_d = s dy[t]ᵀ (w Q)                 dZ from w dH
    dP = s dZ B_gu      dA_gu = dPᵀ x[t]   dB_gu = s dZᵀ P    dx = Σ (dZ W_gu + dP A_gu)

W and the low-rank A and B are those of the row's expert; no dense delta is made. Rows of x and dy are read through the
index. Kept for the backward: x, w, the order, P and Q. Z, twice as wide as anything kept and top-k times as long, is
made again, which costs one of six products; Y never is.

A frozen weight may be stored in another form and made dense for a product (`FrozenExperts`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels import routed_rows
from stoker.kernels.grouped_matmul import grouped_matmul
from stoker.kernels.grouped_outer import grouped_outer
from stoker.kernels.routed_rows import Order, combine, gate, gate_backward, sort_by_expert


class FrozenExperts(Protocol):
    """Weights [E, out, in] kept in some other form than a tensor (see the quant room)."""

    def dense(self, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns them in `dtype`, valid until the next call; experts without rows in `ends` [E] may hold anything."""
        ...


@runtime_checkable
class SingleExperts(Protocol):
    """Weights [E, out, in] that are never in memory together: each expert's is made when it is asked for."""

    def one(self, expert: int) -> Tensor:
        """Returns the weight `[out, in]` of one expert, in the dtype of the forward."""
        ...


class ExpertMatrix(NamedTuple):
    """One linear layer of every expert: `weight` [E, out, in], `bias` [E, out], `a` [E, r, in], `b` [E, out, r]."""

    weight: Tensor | FrozenExperts | SingleExperts
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


class MixtureOptions(NamedTuple):
    """Number of experts, gpt-oss' limit of the gate (None: SwiGLU), and the implementation."""

    num_experts: int
    limit: float | None = None
    implementation: str = "reference"


def mixture_reference(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: ExpertMatrix, down: ExpertMatrix, *, limit: float | None = None
) -> Tensor:
    """The formulas of the forward, expert by expert, in plain differentiable torch: the oracle of the operation."""
    total = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        token, choice = torch.where(chosen == expert)
        inner = routed_rows.gate_reference(_expert_linear(x[token], gate_up, expert), limit)
        total = total.index_add(
            0, token, _expert_linear(inner, down, expert) * weights[token, choice, None].to(x.dtype)
        )
    return total


def _expert_linear(x: Tensor, matrix: ExpertMatrix, expert: int) -> Tensor:
    if isinstance(matrix.weight, Tensor):
        weight = matrix.weight[expert]
    elif isinstance(matrix.weight, SingleExperts):
        weight = matrix.weight.one(expert)
    else:
        raise TypeError("the reference takes dense weights, or those of one expert at a time")
    out = torch.nn.functional.linear(x, weight, None if matrix.bias is None else matrix.bias[expert])
    if matrix.a is not None and matrix.b is not None:
        out = out + matrix.scaling * (x @ matrix.a[expert].T @ matrix.b[expert].T)
    return out


def mixture(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: ExpertMatrix, down: ExpertMatrix, *, options: MixtureOptions
) -> Tensor:
    """Returns the weighted sum [N, D] of the chosen experts' outputs for each token of `x` [N, D].

    weights: [N, k], any float dtype; chosen: [N, k], integer experts; gate_up: to 2 I columns, gate first; down: back
    to D. Computes in the dtype of `x`, or in autocast's where it is on; gradients of x, weights and every tensor that
    requires one, in its own dtype, with float32 sums; no second derivatives. The backward may run twice. Weights of
    one expert at a time (`SingleExperts`) go through the reference.
    """
    if not isinstance(gate_up.weight, Tensor) and isinstance(gate_up.weight, SingleExperts):
        return mixture_reference(x, weights, chosen, gate_up, down, limit=options.limit)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    frozen: Any = tuple(None if isinstance(matrix.weight, Tensor) else matrix.weight for matrix in (gate_up, down))
    tensors = [
        tensor
        for matrix in (gate_up, down)
        for tensor in (matrix.weight if isinstance(matrix.weight, Tensor) else None, matrix.bias, matrix.a, matrix.b)
    ]
    layout = _Layout(frozen, (gate_up.scaling, down.scaling), options)
    with torch.autocast(device, enabled=False):
        order = sort_by_expert(chosen, options.num_experts, implementation=options.implementation)
        return _Mixture.apply(x.contiguous(), weights, order, layout, *tensors)


class _Layout(NamedTuple):
    frozen: tuple[FrozenExperts | None, ...]
    scalings: tuple[float, float]
    options: MixtureOptions


class _Products:
    """The matrices in the working dtype and the products with them."""

    def __init__(self, layout: _Layout, tensors: tuple[Tensor | None, ...], order: Order, dtype: torch.dtype) -> None:
        self.layout, self.order, self.dtype = layout, order, dtype
        self.implementation = layout.options.implementation
        self._tensors = [None if t is None else t.to(dtype).contiguous() for t in tensors]

    def part(self, which: int, index: int) -> Tensor | None:
        """Bias (1), a (2) or b (3) of a matrix."""
        return self._tensors[4 * which + index]

    def _weight(self, which: int) -> Tensor:
        weight, frozen = self._tensors[4 * which], self.layout.frozen[which]
        if weight is not None:
            return weight
        if frozen is None:
            raise ValueError("a matrix of experts has no weight")
        return frozen.dense(self.order.ends, self.dtype)

    def low(self, which: int, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """x Aᵀ [M, r], None without an adapter."""
        a = self.part(which, 2)
        return None if a is None else self._product(x, a, rows)

    def forward(self, which: int, x: Tensor, rows: Tensor | None, low: Tensor | None) -> Tensor:
        """x Wᵀ + c + s low Bᵀ."""
        return grouped_matmul(
            x,
            self._weight(which),
            self.order.ends,
            rows=rows,
            bias=self.part(which, 1),
            product=low,
            factor=None if low is None else self.part(which, 3),
            scaling=self.layout.scalings[which],
            implementation=self.implementation,
        )

    def grad_low(self, which: int, grad: Tensor, rows: Tensor | None) -> Tensor | None:
        """grad B, without the scaling."""
        b = self.part(which, 3)
        return None if b is None else self._product(grad, b, rows, transposed=True)

    def backward(self, which: int, grad: Tensor, rows: Tensor | None, grad_low: Tensor | None) -> Tensor:
        """grad W + s grad_low A."""
        return grouped_matmul(
            grad,
            self._weight(which),
            self.order.ends,
            rows=rows,
            transposed=True,
            product=grad_low,
            factor=None if grad_low is None else self.part(which, 2),
            scaling=self.layout.scalings[which],
            implementation=self.implementation,
        )

    def _product(self, x: Tensor, matrix: Tensor, rows: Tensor | None, *, transposed: bool = False) -> Tensor:
        return grouped_matmul(
            x, matrix, self.order.ends, rows=rows, transposed=transposed, implementation=self.implementation
        )

    def outer(
        self,
        left: Tensor,
        right: Tensor,
        *,
        left_rows: Tensor | None = None,
        right_rows: Tensor | None = None,
        scaling: float = 1.0,
    ) -> Tensor:
        """leftᵀ right over each expert's rows."""
        return grouped_outer(
            left,
            right,
            self.order.ends,
            left_rows=left_rows,
            right_rows=right_rows,
            scaling=scaling,
            implementation=self.implementation,
        )


class _Mixture(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, order: Order, layout: _Layout, *tensors: Tensor | None) -> Tensor:
        """x: [N, D]; weights: [N, k]; tensors: weight, bias, a and b of gate_up and of down."""
        options, products = layout.options, _Products(layout, tensors, order, x.dtype)
        low = products.low(0, x, order.tokens)
        gate_up = products.forward(0, x, order.tokens, low)
        inner = gate(gate_up, limit=options.limit, implementation=options.implementation)
        del gate_up
        low_down = products.low(1, inner, None)
        rows = products.forward(1, inner, None, low_down)
        ctx.layout = layout
        ctx.save_for_backward(x, weights, *order, low, low_down, *tensors)
        return combine(rows, order.place, weights, weights.shape[1], implementation=options.implementation)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x, weights and the tensors that need one."""
        x, weights, *rest = ctx.saved_tensors
        order, (low, low_down), tensors = Order(*rest[:4]), rest[4:6], tuple(rest[6:])
        run = _Backward(ctx.layout, tensors, order, ctx.needs_input_grad)
        grad_x, grad_weights = run(grads[0].contiguous(), x, weights, low, low_down)
        found = (None if g is None or t is None else g.to(t.dtype) for g, t in zip(run.grads, tensors, strict=True))
        return grad_x, grad_weights, None, None, *found


class _Backward:
    """One run of the backward; `grads` are those of the eight tensors."""

    def __init__(
        self, layout: _Layout, tensors: tuple[Tensor | None, ...], order: Order, needs: tuple[bool, ...]
    ) -> None:
        self.layout, self.tensors, self.order = layout, tensors, order
        self.needs_x, self.needs_weights = needs[:2]
        self.needs = needs[4:]
        self.grads: list[Tensor | None] = [None] * len(tensors)

    def __call__(
        self, grad: Tensor, x: Tensor, weights: Tensor, low: Tensor | None, low_down: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(gradient of x or None, gradient of the weights or None), from that of the output [N, D]."""
        options, tokens = self.layout.options, self.order.tokens
        products = _Products(self.layout, self.tensors, self.order, x.dtype)
        sorted_weights = weights.flatten()[self.order.order]
        grad_low = products.grad_low(1, grad, tokens)
        grad_inner = products.backward(1, grad, tokens, grad_low)
        gate_up = products.forward(0, x, tokens, low)
        grad_gate_up, inner, grad_weights = gate_backward(
            gate_up, grad_inner, sorted_weights, limit=options.limit, implementation=options.implementation
        )
        del gate_up, grad_inner
        self._down(products, grad, inner, sorted_weights, (grad_low, low_down))
        del inner
        grad_x = self._gate_up(products, grad_gate_up, x, low)
        if not self.needs_weights:
            return grad_x, None
        bias = products.part(1, 1)
        if bias is not None:  # the gate's sum lacks the part of the output that is no product with H
            grad_weights = grad_weights + self._bias_share(grad, bias)
        choices = grad_weights[self.order.place].view_as(weights)
        return grad_x, choices.to(weights.dtype)

    def _down(
        self,
        products: _Products,
        grad: Tensor,
        inner: Tensor,
        sorted_weights: Tensor,
        lows: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Gradients of down's tensors; `inner` has the weights in it, what multiplies `grad` gets them here."""
        (grad_low, low), tokens, scaling = lows, self.order.tokens, self.layout.scalings[1]
        if self.needs[4]:
            self.grads[4] = products.outer(grad, inner, left_rows=tokens)
        if self.needs[5]:
            self.grads[5] = products.outer(grad, _as_column(sorted_weights, grad.dtype), left_rows=tokens)[..., 0]
        if self.needs[6] and grad_low is not None:
            self.grads[6] = products.outer(grad_low, inner, scaling=scaling)
        if self.needs[7] and low is not None:
            weighted = (low * sorted_weights[:, None]).to(low.dtype)
            self.grads[7] = products.outer(grad, weighted, left_rows=tokens, scaling=scaling)

    def _gate_up(self, products: _Products, grad: Tensor, x: Tensor, low: Tensor | None) -> Tensor | None:
        """Gradients of gate_up's tensors, and of x."""
        tokens, scaling = self.order.tokens, self.layout.scalings[0]
        grad_low = products.grad_low(0, grad, None)
        if self.needs[0]:
            self.grads[0] = products.outer(grad, x, right_rows=tokens)
        if self.needs[1]:
            self.grads[1] = products.outer(grad, _as_column(torch.ones_like(grad[:, 0]), grad.dtype))[..., 0]
        if self.needs[2] and grad_low is not None:
            self.grads[2] = products.outer(grad_low, x, right_rows=tokens, scaling=scaling)
        if self.needs[3] and low is not None:
            self.grads[3] = products.outer(grad, low, scaling=scaling)
        if not self.needs_x:
            return None
        rows = products.backward(0, grad, None, grad_low)
        top_k = self.order.place.shape[0] // x.shape[0]
        return combine(rows, self.order.place, None, top_k, implementation=self.layout.options.implementation)

    def _bias_share(self, grad: Tensor, bias: Tensor) -> Tensor:
        """dy[t] · c_d of each sorted row [M]: as products of all tokens with all experts' biases, then picked."""
        shares = grad @ bias.t()
        expert = torch.searchsorted(
            self.order.ends, torch.arange(self.order.tokens.shape[0], device=grad.device, dtype=torch.int32), right=True
        )
        # In a rehearsal (`kernels.ahead`) the ends are not there yet.
        return shares[self.order.tokens.long(), expert.clamp_(max=bias.shape[0] - 1)]


def _as_column(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype)[:, None].contiguous()
