"""The head's matmul and the cross-entropy in one: the [N, V] logits never exist at once.

    z = h Wᵀ + b        loss = Σ_n (log Σ_v exp z_nv − z_n,target(n))
    p = softmax(z) − onehot(target)        dh = p W        dW = pᵀ h        db = Σ_n p

Rows whose target is `ignore_index` are left out before the first matmul. The rest runs in chunks; since the loss is the
last thing that a forward computes, each chunk's gradients are computed while its logits are at hand (the idea of
Liger-Kernel, arXiv:2410.10989), and the backward only multiplies them by the incoming scalar. A weight that is frozen
costs no gradient matmul. The sums are fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_BYTES = 16 * 2**20
"""Logits held at once by default, in bytes of fp32."""


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The formula with all logits at once; the oracle of the implementation below."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    implementation: str = "reference",
) -> Tensor:
    """Returns the cross-entropy summed over the trained rows: an fp32 scalar, 0 when there are none.

    hidden: [N, D]; weight: [V, D]; targets: [N] int64, `ignore_index` where nothing is trained; bias: [V] or None.
    `chunk_tokens`: rows of logits held at once, by default as many as fit `DEFAULT_CHUNK_BYTES`. Under autocast the
    matmuls run in its dtype. Raises ValueError for an unknown implementation.
    """
    if implementation != "reference":
        raise ValueError(f"linear_cross_entropy has no implementation {implementation!r}; known: reference")
    rows = chunk_tokens or max(1, DEFAULT_CHUNK_BYTES // (4 * weight.shape[0]))
    needs_gradients = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, ignore_index, needs_gradients)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward, for the inputs that need them."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
        ignore_index: int,
        needs_gradients: bool,
    ) -> Tensor:
        """hidden: [N, D], weight: [V, D]; returns the summed loss."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants = [needs_gradients and need for need in ctx.needs_input_grad[:3]]
        trained = (targets != ignore_index).nonzero().squeeze(1)
        with torch.autocast(device, enabled=False):
            rows = hidden.index_select(0, trained).to(dtype)
            gradients = _Gradients(rows, weight, bias, wants)
            loss = _chunked_loss(rows, weight.to(dtype), bias, targets[trained], gradients, chunk_tokens=chunk_tokens)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.num_rows = hidden.shape[0]
        ctx.save_for_backward(trained, gradients.hidden, gradients.weight, gradients.bias)
        return loss

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Scales what the forward computed; the gradient of hidden gets its untrained rows back as zeros."""
        trained, grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        (grad,) = grads
        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = grad_rows.new_zeros(ctx.num_rows, grad_rows.shape[1], dtype=ctx.dtypes[0])
            grad_hidden.index_copy_(0, trained, (grad_rows * grad).to(ctx.dtypes[0]))
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.dtypes[1])
        if grad_bias is not None:
            grad_bias = grad_bias * grad
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _Gradients:
    """Buffers for the gradients that are wanted; None for the others."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool]) -> None:
        self.hidden = torch.empty_like(rows) if wants[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None

    def add(self, chunk: slice, h: Tensor, weight: Tensor, p: Tensor) -> None:
        """Adds a chunk's: h [c, D] in the compute dtype, p [c, V] in fp32, softmax minus one-hot."""
        if self.bias is not None:
            self.bias += p.sum(0)
        p = p.to(h.dtype)
        if self.hidden is not None:
            torch.mm(p, weight, out=self.hidden[chunk])
        if self.weight is not None and h.dtype == torch.float32:
            self.weight.addmm_(p.t(), h)
        elif self.weight is not None:
            self.weight += p.t() @ h

    def __bool__(self) -> bool:
        return any(buffer is not None for buffer in (self.hidden, self.weight, self.bias))


def _chunked_loss(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradients: _Gradients, *, chunk_tokens: int
) -> Tensor:
    """The summed loss of trained `rows` [n, D], and their gradients into `gradients`."""
    loss = rows.new_zeros((), dtype=torch.float32)
    for start in range(0, rows.shape[0], chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, rows.shape[0]))
        h, target = rows[chunk], targets[chunk, None]
        logits = torch.mm(h, weight.t()).float()
        if bias is not None:
            logits += bias
        log_sum = logits.logsumexp(-1, keepdim=True)
        loss += (log_sum - logits.gather(1, target)).sum()
        if gradients:
            p = logits.sub_(log_sum).exp_()
            p.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
            gradients.add(chunk, h, weight, p)
    return loss
