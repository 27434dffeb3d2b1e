"""Low-rank adapters on one frozen linear weight that several projections share.

With X `[N, in]`, a frozen W `[out, in]` and, for each adapted part i of the output (rows `slices[i]` of W),
A_i `[r, in]` and B_i `[out_i, r]`:

    Y       = X W^T + bias,    then    Y_i += s (X' A_i^T) B_i^T        X' = X, or X with dropout
    dP_i    = s dY_i B_i                                                `[N, r]`, used twice
    dA_i    = dP_i^T X'        dB_i = s dY_i^T (X' A_i^T)
    dX      = dY W + dropout'(sum_i dP_i A_i)

The A_i are kept as one matrix `[n r, in]`, so that a group costs one skinny matmul with A however many parts it has,
and the B_i one below the other `[sum(out_i), r]`. The product X' A^T is kept for the backward pass because it is tiny
(n r columns); X' is not: its mask is made again from a seed.

LoRA: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.dropout import draw_seed, drop


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, scaling: float, slices: Sequence[slice]
) -> Tensor:
    """Returns what `lora_linear` does without dropout, part by part in plain torch: the oracle of its tests."""
    output = torch.nn.functional.linear(x, weight, bias)
    update = torch.zeros_like(output)
    rank = a.shape[0] // len(slices)
    for a_part, b_part, rows in zip(a.split(rank), b.split(_sizes(slices)), slices, strict=True):
        update[..., rows] = scaling * (x @ a_part.T @ b_part.T)
    return output + update


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scaling: float,
    slices: Sequence[slice],
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Returns `x @ weight.T + bias`, plus on each adapted part of the output its low-rank update.

    `x` `[..., in]`, `weight` `[out, in]`, `bias` `[out]` or None, `a` `[len(slices) * rank, in]`, `b` `[sum of the
    slices' sizes, rank]`; returns `[..., out]` in the autocast dtype, or in that of `x` outside autocast. `a` and `b`
    may have a wider dtype (they are trained in fp32): they are cast here, their gradients come back in their own dtype.
    With `training`, `dropout` zeroes inputs of the adapters (not of the base) with this probability; its seed is drawn
    from torch's CPU generator, so that a recomputed forward whose random state is restored drops the same values.
    Gradients of `weight` and `bias` are computed only if they require them; no second derivatives.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rate = dropout if training else 0.0
    seed = draw_seed() if rate > 0.0 else 0
    flat = x.reshape(-1, x.shape[-1])
    output = _LoraLinear.apply(flat, weight, bias, a, b, _Options(scaling, tuple(slices), rate, seed))
    return output.view(*x.shape[:-1], weight.shape[0])


@dataclass(frozen=True)
class _Options:
    scaling: float
    slices: tuple[slice, ...]
    rate: float
    seed: int


class _LoraLinear(torch.autograd.Function):
    """The products of the module's docstring, each once, updates and base in one output."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, options: _Options
    ) -> Tensor:
        dtype = x.dtype
        product = _drop(x, options) @ a.to(dtype).T
        output = _output(x, weight.to(dtype), None if bias is None else bias.to(dtype), b.to(dtype), product, options)
        ctx.save_for_backward(x, weight, a, b, product)
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad_output,) = grad_outputs
        x, weight, a, b, product = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        grad_product, grad_b = _grad_product_and_b(grad_output, product, b.to(x.dtype), ctx.options, needs_b)
        grad_x = _grad_x(grad_output, grad_product, weight.to(x.dtype), a.to(x.dtype), ctx.options) if needs_x else None
        return (
            grad_x,
            (grad_output.T @ x).to(weight.dtype) if needs_weight else None,
            grad_output.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            (grad_product.T @ _drop(x, ctx.options)).to(a.dtype) if needs_a else None,
            None if grad_b is None else grad_b.to(b.dtype),
            None,
        )


def _output(  # noqa: PLR0917
    x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, product: Tensor, options: _Options
) -> Tensor:
    """The base's output with the updates [N, out], from P = X' A^T.

    Where every column has an update they come first, and the big product adds to them: what it reads of them it reads
    while it multiplies, which a pass of its own over the output does not.
    """
    if bias is not None or sum(_sizes(options.slices)) != weight.shape[0]:
        output = torch.nn.functional.linear(x, weight, bias)
        for rows, part, b_part in _parts(options.slices, b, product):
            output[:, rows].addmm_(part, b_part.T, alpha=options.scaling)
        return output
    output = x.new_empty(x.shape[0], weight.shape[0])
    scaled = product if options.scaling == 1.0 else product * options.scaling
    for rows, part, b_part in _parts(options.slices, b, scaled):
        torch.mm(part, b_part.T, out=output[:, rows])
    return output.addmm_(x, weight.T)


def _grad_product_and_b(
    grad_output: Tensor, product: Tensor, b: Tensor, options: _Options, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns dP `[N, n r]` and, when needed, dB `[sum(out_i), r]`; parts of `grad_output` are read where they lie."""
    grad_product = torch.empty_like(product)
    grad_b = torch.empty_like(b) if needs_b else None
    for rows, grad_part, b_part in _parts(options.slices, b, grad_product):
        torch.mm(grad_output[:, rows], b_part, out=grad_part)
    if grad_b is not None:
        for rows, part, grad_b_part in _parts(options.slices, grad_b, product):
            torch.mm(grad_output[:, rows].T, part, out=grad_b_part)
        grad_b.mul_(options.scaling)
    return grad_product.mul_(options.scaling), grad_b


def _grad_x(grad_output: Tensor, grad_product: Tensor, weight: Tensor, a: Tensor, options: _Options) -> Tensor:
    if options.rate == 0.0:
        return (grad_product @ a).addmm_(grad_output, weight)
    return (grad_output @ weight).add_(_drop(grad_product @ a, options))


def _drop(x: Tensor, options: _Options) -> Tensor:
    """Dropout with the options' seed; its own derivative, being linear in `x`."""
    return drop(x, rate=options.rate, seed=options.seed)


def _parts(slices: Sequence[slice], b: Tensor, product: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each part: its rows of the weight, its columns of `product` and its rows of `b`, as views."""
    return zip(slices, product.split(b.shape[1], dim=1), b.split(_sizes(slices)), strict=True)


def _sizes(slices: Sequence[slice]) -> list[int]:
    return [rows.stop - rows.start for rows in slices]
