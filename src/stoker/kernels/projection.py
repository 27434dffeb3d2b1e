"""Linear layers with low-rank updates, as functions on rows, for kernels that write their own backward.

    Y = X Wᵀ + bias,  Y_i += s P_i B_iᵀ,  P_i = X' A_iᵀ        dP_i = s dY_i B_i        dX = dY W + drop(Σ_i dP_i A_i)
    dA_i = dP_iᵀ X'        dB_i = s dY_iᵀ P_i

for each adapted part i, a slice of the output's columns (LoRA, arXiv:2106.09685); X' = drop(X), whose mask is made
again from its seed wherever it is needed. With a scale c of columns, as DoRA (arXiv:2402.09353) has it,

    Y = c Z + bias,  Z = X Wᵀ + updates        dZ = c dY, in place of dY above        dc = Σ_n dY Z

where Z is not kept: (Y - bias) / c where Y is at hand, or else the products again. `kernels/lora.py` is the same
under autograd, for one layer on its own.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from stoker.kernels import dora, low_rank
from stoker.kernels.dropout import drop
from stoker.kernels.fp8 import Rounded, empty_rounded
from stoker.kernels.scaled_update import scaled_update


class FrozenMatrix(Protocol):
    """A weight kept in some other form than a tensor (see the quant room).

    `accumulates`: its products can add to what is there for less than a pass over it.
    """

    accumulates: bool

    @property
    def shape(self) -> torch.Size:
        """`[out, in]`."""
        ...

    def matmul(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `x @ W.T`, added to `onto` [N, out] in place where that is given."""
        ...

    def matmul_transposed(self, grad: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `grad @ W`, added to `onto` [N, in] in place where that is given."""
        ...


@runtime_checkable
class ScaledMatrix(Protocol):
    """A frozen weight whose products are cheaper without their scales (`kernels/scaled_update.py`), read in fp8.

    `rounds_early`: what makes the rows that a product reads leaves them in fp8 by itself, instead of a pass before it.
    """

    scales_after: bool
    rounds_early: bool

    @property
    def gradient_factor(self) -> Tensor:
        """What the columns of a gradient are multiplied by before they are rounded, fp32 [out]."""
        ...

    def unscaled(self, x: Tensor | Rounded) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns R `[N, out]`, scales of its rows and scales of its columns: `x @ W.T` is their product."""
        ...

    def unscaled_transposed(self, grad: Tensor | Rounded) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the same of `grad @ W`; in fp8, `grad` holds `gradient_factor`."""
        ...


class Projection(NamedTuple):
    """A linear layer `[in]` to `[out]`, with low-rank updates of the rows in `slices` when `a` is there.

    `weight` `[out, in]`, `bias` `[out]` or None, `a` `[n r, in]`, `b` `[sum of the slices' sizes, r]`; `rate` and
    `seed` of the dropout on what the updates read; `scale` fp32 `[out]`, DoRA's magnitude / norm of each row of weight
    and update, or None for ones.
    """

    weight: Tensor | FrozenMatrix
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    slices: tuple[slice, ...] = ()
    rate: float = 0.0
    seed: int = 0
    scale: Tensor | None = None

    @property
    def unscaled(self) -> Projection:
        """The layer that gives what its scale multiplies, Z: without scale and bias. Itself where it has no scale."""
        return self if self.scale is None else self._replace(scale=None, bias=None)


class Piece(NamedTuple):
    """Which implementation runs, and where the rows at hand begin in the whole that dropout's mask counts."""

    implementation: str = "reference"
    first_row: int = 0


WHOLE = Piece()


def product_of(projection: Projection, x: Tensor, piece: Piece = WHOLE) -> Tensor | None:
    """Returns P = X' Aᵀ [N, n r] of x [N, in], or None without adapters."""
    return None if projection.a is None else _dropped(projection, x, piece) @ projection.a.t()


def grad_a(projection: Projection, x: Tensor, grad_product: Tensor, piece: Piece = WHOLE) -> Tensor:
    """Returns dA [n r, in] from x [N, in] and dP [N, n r]."""
    return grad_product.t() @ _dropped(projection, x, piece)


def _dropped(projection: Projection, x: Tensor, piece: Piece, onto: Tensor | None = None) -> Tensor:
    return drop(
        x,
        rate=projection.rate,
        seed=projection.seed,
        first_row=piece.first_row,
        onto=onto,
        implementation=piece.implementation,
    )


def rounded_input(projection: Projection, num_rows: int, implementation: str) -> Rounded | None:
    """Returns memory for the rows that a projection will read in fp8, or None where it reads them as they are.

    What makes the rows fills it, and `project` or `project_onto` is given it beside them.
    """
    weight = _scaled_matrix(projection, implementation)
    if weight is None or not weight.rounds_early or not _is_whole(projection) or projection.scale is not None:
        return None
    return empty_rounded(num_rows, projection.weight.shape[1], weight.gradient_factor.device)


def gradient_factor(projection: Projection, implementation: str) -> Tensor | None:
    """Returns what the columns of the output's gradient are multiplied by for `grad_input` to read it in fp8.

    fp32 [out]; None where it reads the gradient as it is.
    """
    weight = _scaled_matrix(projection, implementation)
    is_read = projection.a is not None and projection.rate == 0.0 and projection.scale is None
    return weight.gradient_factor if weight is not None and weight.rounds_early and is_read else None


def rounded_gradient(projection: Projection, num_rows: int, implementation: str) -> Rounded | None:
    """Returns memory for the output's gradient in fp8, or None where there is no `gradient_factor`."""
    factor = gradient_factor(projection, implementation)
    return None if factor is None else empty_rounded(num_rows, len(factor), factor.device)


def project(
    projection: Projection,
    x: Tensor,
    piece: Piece = WHOLE,
    *,
    product: Tensor | None = None,
    rounded: Rounded | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns (output [N, out], P [N, n r] or None without adapters) for x [N, in].

    `product` is P if it is known, `rounded` x in fp8 if that is there (`rounded_input`).
    """
    if projection.scale is not None:
        output, product = project(projection.unscaled, x, piece, product=product)
        return _scaled(projection, output, piece.implementation), product
    product = product_of(projection, x, piece) if product is None else product
    if product is None:
        return project_base(projection, x), None
    scaled = _scaled_matrix(projection, piece.implementation)
    if scaled is not None and projection.b is not None and _is_whole(projection):
        ends, scaling = [rows.stop for rows in projection.slices], projection.scaling
        options = {"ends": ends, "scaling": scaling, "implementation": piece.implementation}
        output = scaled_update(*scaled.unscaled(rounded or x), product, projection.b, **options)
        return output if projection.bias is None else output.add_(projection.bias), product
    if not (_accumulates(projection) and _is_whole(projection)):
        return _add_updates(projection, project_base(projection, x), product), product
    # The updates first: the big product adds to them for less than a pass over its result.
    output = x.new_empty(x.shape[0], projection.weight.shape[0])
    scaled = product if projection.scaling == 1.0 else product * projection.scaling
    for rows, part, b in _parts(projection, scaled):
        if projection.bias is None:
            torch.mm(part, b.t(), out=output[:, rows])
        else:
            torch.addmm(projection.bias[rows], part, b.t(), out=output[:, rows])
    return _matmul_onto(output, projection.weight, x), product


def project_onto(
    projection: Projection,
    x: Tensor,
    residual: Tensor,
    product: Tensor | None,
    *,
    implementation: str = "reference",
    rounded: Rounded | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns `residual` plus the layer's output [N, out], with `product` = P; for a layer of one part.

    `rounded`: x in fp8 if that is there (`rounded_input`). `out`: where the result is written, if given.
    """
    weight = projection.weight
    if isinstance(weight, Tensor) and _is_plain(projection, residual):
        # The product adds to a copy of the residual: less is moved than by a pass that reads both, and it is rounded
        # once.
        return torch.addmm(residual, x, weight.t(), out=out)
    output = _project_onto(projection, x, residual, product, implementation=implementation, rounded=rounded)
    return output if out is None else out.copy_(output)


def _project_onto(
    projection: Projection,
    x: Tensor,
    residual: Tensor,
    product: Tensor | None,
    *,
    implementation: str,
    rounded: Rounded | None,
) -> Tensor:
    if projection.scale is not None:
        unscaled, _ = project(projection.unscaled, x, Piece(implementation), product=product)
        return _scaled(projection, unscaled, implementation, residual=residual)
    if product is None or projection.b is None:
        return project_base(projection, x).add_(residual)
    b, scaling = projection.b, projection.scaling
    scaled = _scaled_matrix(projection, implementation)
    if scaled is not None:
        options = {"ends": [b.shape[0]], "scaling": scaling, "implementation": implementation}
        output = scaled_update(*scaled.unscaled(rounded or x), product, b, residual=residual, **options)
        return output if projection.bias is None else output.add_(projection.bias)
    if _accumulates(projection) and projection.bias is None:
        update = low_rank.add_update(None, residual, product, b, scaling=scaling, implementation=implementation)
        return _matmul_onto(update, projection.weight, x)
    output = project_base(projection, x)
    return low_rank.add_update(output, residual, product, b, scaling=scaling, implementation=implementation)


def _scaled(projection: Projection, unscaled: Tensor, implementation: str, *, residual: Tensor | None = None) -> Tensor:
    """The layer's output, and a residual with it, over Z [N, out]; for a layer with a scale."""
    if projection.scale is None:
        raise ValueError("a projection has no scale")
    options = {"bias": projection.bias, "residual": residual, "out": unscaled, "implementation": implementation}
    return dora.scaled(unscaled, projection.scale, **options)


def _is_plain(projection: Projection, residual: Tensor) -> bool:
    """Whether there is a weight in the residual's dtype, and nothing else."""
    is_alone = projection.b is None and projection.bias is None and projection.scale is None
    return is_alone and isinstance(projection.weight, Tensor) and projection.weight.dtype == residual.dtype


def _scaled_matrix(projection: Projection, implementation: str) -> ScaledMatrix | None:
    """The weight, if its product should leave its scales to the pass of the updates."""
    weight = projection.weight
    if implementation != "triton" or isinstance(weight, Tensor) or not isinstance(weight, ScaledMatrix):
        return None
    return weight if weight.scales_after else None


def _accumulates(projection: Projection) -> bool:
    """Whether the big matmul adds to what is there: on a GPU it does so for less than a pass over its result."""
    return isinstance(projection.weight, Tensor) or projection.weight.accumulates


def _is_whole(projection: Projection) -> bool:
    """Whether every row of the weight has an adapter."""
    return sum(rows.stop - rows.start for rows in projection.slices) == projection.weight.shape[0]


def _matmul_onto(output: Tensor, weight: Tensor | FrozenMatrix, x: Tensor) -> Tensor:
    return output.addmm_(x, weight.t()) if isinstance(weight, Tensor) else weight.matmul(x, onto=output)


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
    projection: Projection,
    grad: Tensor,
    product: Tensor | None,
    *,
    factored: low_rank.Factored | None = None,
    implementation: str = "reference",
) -> tuple[Tensor | None, Tensor | None]:
    """Returns (dP [N, n r], dB like b) from the output's gradient [N, out] and the forward's product; None for None.

    `factored` takes dP times a factor of each row as well, where there is a dP.
    """
    if projection.b is None or product is None:
        return None, None
    return low_rank.grad_pair(
        grad,
        product,
        projection.b,
        slices=projection.slices,
        scaling=projection.scaling,
        factored=factored,
        implementation=implementation,
    )


def grad_input(
    projection: Projection,
    grad: Tensor,
    grad_product: Tensor | None,
    piece: Piece = WHOLE,
    *,
    rounded: Rounded | None = None,
) -> Tensor:
    """Returns the gradient [N, in] of a projection's input, from that of its output and dP.

    `rounded`: `grad` times the `gradient_factor` in fp8 if that is there (`rounded_gradient`).
    """
    weight = projection.weight
    if grad_product is None or projection.a is None:
        return grad @ weight if isinstance(weight, Tensor) else weight.matmul_transposed(grad)
    scaled = _scaled_matrix(projection, piece.implementation)
    if scaled is not None and projection.rate == 0.0:
        options = {"ends": [projection.a.shape[1]], "implementation": piece.implementation}
        raw = scaled.unscaled_transposed(rounded or grad)
        return scaled_update(*raw, grad_product, projection.a.t(), **options)
    if _accumulates(projection):
        grad_x = _dropped(projection, grad_product @ projection.a, piece)
        if isinstance(weight, Tensor):
            return grad_x.addmm_(grad, weight)
        return weight.matmul_transposed(grad, onto=grad_x)
    grad_x = grad @ weight if isinstance(weight, Tensor) else weight.matmul_transposed(grad)
    if projection.rate == 0.0:
        return grad_x.addmm_(grad_product, projection.a)
    return _dropped(projection, grad_product @ projection.a, piece, onto=grad_x)


def grad_unscaled(projection: Projection, grad: Tensor, *, implementation: str = "reference") -> Tensor:
    """Returns dZ [N, out] from dY: a new tensor, or `grad` itself where the layer has no scale."""
    if projection.scale is None:
        return grad
    return dora.scaled(grad, projection.scale, implementation=implementation)


def grads_by_output(
    projection: Projection, grad: Tensor, output: Tensor, *, implementation: str = "reference"
) -> tuple[Tensor, Tensor | None]:
    """Returns (dZ [N, out], written over dY; dc [out], fp32) from dY and Y [N, out]; (dY, None) without a scale.

    A scale of exactly 0 leaves nothing of Z in Y: its gradient is 0, and its column stays as it is.
    """
    scale = projection.scale
    if scale is None:
        return grad, None
    of_bias = None if projection.bias is None else grad.sum(0, dtype=torch.float32) * projection.bias
    total = dora.scaled_backward(grad, output, scale, out=grad, implementation=implementation)
    if of_bias is not None:
        total -= of_bias
    return grad, torch.where(scale == 0.0, 0.0, total / scale)


def grads_by_input(
    projection: Projection,
    grad: Tensor,
    x: Tensor,
    product: Tensor | None,
    piece: Piece = WHOLE,
    *,
    only_scale: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the same from dY, the input X [N, in] and P, by the layer's products again; dY stays as it is.

    `only_scale`: dZ is there already, and dY is returned in its place.
    """
    if projection.scale is None:
        return grad, None
    unscaled, _ = project(projection.unscaled, x, piece, product=product)
    out = None if only_scale else unscaled
    total = dora.scaled_backward(grad, unscaled, projection.scale, out=out, implementation=piece.implementation)
    return grad if out is None else out, total
