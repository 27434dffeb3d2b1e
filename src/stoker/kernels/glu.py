"""SwiGLU (Shazeer 2020, arXiv:2002.05202) on gate and up as the two halves of one tensor.

    [g, u] = halves of gate_up         y = silu(g) · u,  silu(g) = g · σ(g)

    du = dy · silu(g)                  dg = dy · u · σ(g) · (1 + g · (1 − σ(g)))

Saved for backward: gate_up only; silu(g) is computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The formula; the oracle of the implementation below."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu(gate_up: Tensor, *, implementation: str = "reference") -> Tensor:
    """Returns `silu(gate) * up`: [..., 2F], gate first, to [..., F] of the same dtype.

    Raises ValueError for an unknown implementation.
    """
    if implementation != "reference":
        raise ValueError(f"swiglu has no implementation {implementation!r}; known: reference")
    return _SwiGlu.apply(gate_up)


class _SwiGlu(torch.autograd.Function):
    """Plain torch with the backward written out, straight into the two halves of the gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """gate_up: [..., 2F]."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Gradient of gate_up."""
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up
