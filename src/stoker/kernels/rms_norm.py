"""Root-mean-square norm (arXiv:1910.07467), alone and fused with the residual add before it.

    r = (mean(x²) + ε)^-½          y = x · r · w

    g  = dy · w                    dx = r · g − x · (r³ / D) · Σ_d (g · x)
    dw = Σ_rows dy · x · r

Saved for backward: x and r (one number a row). Statistics are fp32 whatever the dtype of x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The formula, step by step; the oracle of the implementations below."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, implementation: str = "reference") -> Tensor:
    """Returns `x` over its root mean square times `weight`, in the dtype of `x`.

    x: [..., D]; weight: [D]. Raises ValueError for an unknown implementation.
    """
    if implementation != "reference":
        raise ValueError(f"rms_norm has no implementation {implementation!r}; known: reference")
    return _RmsNorm.apply(x, weight, epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(residual + x), residual + x), both [..., D]; ValueError for an unknown implementation."""
    if implementation != "reference":
        raise ValueError(f"add_rms_norm has no implementation {implementation!r}; known: reference")
    total = residual + x
    return _RmsNorm.apply(total, weight, epsilon), total


class _RmsNorm(torch.autograd.Function):
    """Plain torch with the backward written out: half of autograd's passes over x, and only x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x: [..., D], weight: [D]."""
        wide = x if x.dtype == torch.float32 else x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return torch.mul(wide, rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of x and weight, each only where asked for."""
        x, weight, rstd = ctx.saved_tensors
        wide = x if x.dtype == torch.float32 else x.float()
        grad = grads[0] if grads[0].dtype == torch.float32 else grads[0].float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            # Σ_rows (dy · x) · r as a matrix-vector product: no [rows, D] product is kept.
            product = (grad * wide).reshape(-1, x.shape[-1])
            grad_weight = torch.mv(product.t(), rstd.reshape(-1)).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = grad * weight
            dot = (scaled * wide).sum(-1, keepdim=True)
            coefficient = dot.mul_(rstd.pow(3)).div_(x.shape[-1])
            grad_x = scaled.mul_(rstd).addcmul_(wide, coefficient, value=-1).to(x.dtype)
        return grad_x, grad_weight, None
