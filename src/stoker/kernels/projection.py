"""Linear layers with low-rank updates, as functions on rows, for kernels that write their own backward.

    Y = X Wᵀ + bias,  Y_i += s (X A_iᵀ) B_iᵀ        dP_i = s dY_i B_i        dX = dY W + Σ_i dP_i A_i
    dA_i = dP_iᵀ X        dB_i = s dY_iᵀ (X A_iᵀ)

for each adapted part i, a slice of the output's columns (LoRA, arXiv:2106.09685). `kernels/lora.py` is the same under
autograd, for one layer on its own.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from stoker.kernels import low_rank


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


def project(projection: Projection, x: Tensor, *, update: bool = True) -> tuple[Tensor, Tensor | None]:
    """Returns (output [N, out], x Aᵀ [N, n r] or None without adapters) for x [N, in].

    Without `update` the output is that of the frozen layer alone, for a caller who adds the rest.
    """
    output = project_base(projection, x)
    if projection.a is None or projection.b is None:
        return output, None
    product = x @ projection.a.t()
    return _add_updates(projection, output, product) if update else output, product


def project_base(projection: Projection, x: Tensor) -> Tensor:
    """Returns the output [N, out] of the layer without its adapters."""
    weight = projection.weight
    output = x @ weight.t() if isinstance(weight, Tensor) else weight.matmul(x)
    if projection.bias is not None:
        output += projection.bias
    return output


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


def grad_product(
    projection: Projection, grad: Tensor, product: Tensor | None, *, implementation: str = "reference"
) -> tuple[Tensor | None, Tensor | None]:
    """Returns (dP [N, n r], dB like b) from the output's gradient [N, out] and the forward's product; None for None."""
    if projection.b is None or product is None:
        return None, None
    return low_rank.grad_pair(
        grad,
        product,
        projection.b,
        slices=projection.slices,
        scaling=projection.scaling,
        implementation=implementation,
    )


def grad_input(projection: Projection, grad: Tensor, grad_product: Tensor | None) -> Tensor:
    """Returns the gradient [N, in] of a projection's input, from that of its output and dP."""
    weight = projection.weight
    grad_x = grad @ weight if isinstance(weight, Tensor) else weight.matmul_transposed(grad)
    if grad_product is not None and projection.a is not None:
        grad_x.addmm_(grad_product, projection.a)
    return grad_x
