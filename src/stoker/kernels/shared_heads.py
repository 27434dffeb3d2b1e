"""Causal attention of query heads that share keys and values, by a kernel that knows no such heads.

Memory-efficient attention (Rabe and Staats 2021, arXiv:2112.05682; PyTorch's, from CUTLASS) is what GPUs before Ampere
have, and fp32 on any GPU. It wants a key and a value head for every query head. Those are made for it, in the forward
and again in the backward, and go at once: an 8B would keep 33 MiB of them a layer and 2,048 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_efficient_attention


def has_flash(q: Tensor) -> bool:
    """Whether flash attention, the variable-length one among it, runs on `q`: on CUDA in half precision, from Ampere
    on."""
    is_half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    return is_half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def knows_shared_heads(q: Tensor) -> bool:
    """Whether a fused attention on the device of `q`, in its dtype, takes keys and values as they are shared: on a CPU
    PyTorch's own does, on CUDA flash attention and cuDNN's, which runs where that does."""
    return not q.is_cuda or has_flash(q)


def repeated(x: Tensor, groups: int) -> Tensor:
    """Returns keys or values [B, T, K, E] as [B, T, K * groups, E], one for every query head."""
    return x.repeat_interleave(groups, dim=2)


def can_share(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `shared_heads` can run on these: the kernel wants rows of a multiple of 16 bytes, and one length."""
    if q.shape[1] != k.shape[1] or q.shape[-1] != v.shape[-1]:
        return False
    heads = q.transpose(1, 2)
    return can_use_efficient_attention(SDPAParams(heads, heads, heads, None, 0.0, True, False))


def shared_heads(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention over whole rows [B, T, H, E]; q: [B, T, H, E], k and v: [B, T, K, E], H a multiple of K.

    `scale`: of the scores, by default E^-½. The graph keeps q, k and v as they are, the result and fp32 [B, H, T].
    """
    return _SharedHeads.apply(q, k, v, scale)


class _SharedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        out, *statistics = _attend(q, k, v, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return *_attend_backward(grad, *ctx.saved_tensors, scale=ctx.scale), None


def _of_all(q: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    """Heads before positions, as PyTorch has them, each query head with keys and values of its own."""
    groups = q.shape[2] // shared[0].shape[2]
    return tuple(x.transpose(1, 2) for x in (q, *(repeated(x, groups) for x in shared)))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    """The result and what its backward wants besides: the logarithms of the softmaxes' sums and no dropout's seeds."""
    forward = torch.ops.aten._scaled_dot_product_efficient_attention
    out, *statistics = forward(*_of_all(q, k, v), None, True, 0.0, True, scale=scale)
    return out.transpose(1, 2), *statistics


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *statistics: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; those of a shared head are summed over its query heads in fp32."""
    backward, wanted = torch.ops.aten._scaled_dot_product_efficient_attention_backward, [True, True, True, False]
    heads = (grad.transpose(1, 2), *_of_all(q, k, v), None, out.transpose(1, 2))
    grad_q, *grads, _ = backward(*heads, *statistics, 0.0, wanted, True, scale=scale)
    shape = (k.shape[2], q.shape[2] // k.shape[2])
    shared = (x.unflatten(1, shape).sum(2, dtype=torch.float32).to(x.dtype).transpose(1, 2) for x in grads)
    grad_k, grad_v = shared
    return grad_q.transpose(1, 2), grad_k, grad_v
