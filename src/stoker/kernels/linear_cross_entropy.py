"""The head's matmul and the cross-entropy in one: the [N, V] logits never exist at once.

    z = cap · tanh(s (h Wᵀ + b) / cap)         (s: logit scale; without a cap z = s (h Wᵀ + b))
    L = log Σ_v exp z_v                        loss = L − (1 − ε) z_target − ε mean_v(z) + ζ L²      (a row's)
    dz = softmax(z) (1 + 2 ζ L) − (1 − ε) onehot(target) − ε / V
    p = dz · s (1 − (z / cap)²)                dh = p W        dW = pᵀ h        db = Σ_n p

ε is label smoothing (arXiv:1512.00567), ζ the z-loss (PaLM, arXiv:2204.02311), the cap that of Gemma 2
(arXiv:2408.00118). Rows whose target is `ignore_index` are left out before the first matmul. The rest runs in chunks;
since the loss is the last thing that a forward computes, each chunk's gradients are computed while its logits are at
hand (the idea of Liger-Kernel, arXiv:2410.10989), and the backward only multiplies them by the incoming scalar. A
weight that is frozen costs no gradient matmul. The sums are fp32. A frozen head may run in fp8 (`rounded_head`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.fp8 import Rounded, empty_rounded, quantize_rows
from stoker.kernels.rounded_head import RoundedHead
from stoker.kernels.triton_support import check_implementation
from stoker.kernels.turn_logits import (
    LossOptions,
    scaled,
    turn_logits_reference,
    turn_logits_triton,
    turn_rounded_reference,
    turn_rounded_triton,
)

DEFAULT_CHUNK_BYTES = 32 * 2**20
"""Logits held at once by default, in bytes of fp32. Fewer mean fewer rows a chunk, and each reads the whole weight:
on a CPU core, 512 rows of D 1024 and V 32000 took 0.52 s at 32 MiB and 0.94 s at 4 MiB."""

TRITON_CHUNK_BYTES = 256 * 2**20
"""The same for Triton, in bytes of the working dtype: enough rows to keep a large GPU's matmul busy.

A trained head has a gradient in fp32, which each chunk reads and writes as a whole: with chunks of half its bytes that
traffic stays below that of the chunks themselves (1B's head, 16,384 rows, by arithmetic: 17 GB instead of 34)."""


class _Setting(NamedTuple):
    """How chunks run: rows held at once, the target that trains nothing, the loss's variations, the implementation.

    `num_rows` and `rounded`: as `linear_cross_entropy` takes them.
    """

    chunk_tokens: int
    ignore_index: int
    options: LossOptions
    triton: bool
    num_rows: int | None = None
    rounded: RoundedHead | None = None


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    options: LossOptions | None = None,
) -> Tensor:
    """The formula with all logits at once; the oracle of the implementations below."""
    options = options or LossOptions()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.logit_scale
    if options.soft_cap is not None:
        logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
    loss = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="sum", label_smoothing=options.label_smoothing
    )
    return loss + options.z_loss * logits.logsumexp(-1)[targets != ignore_index].square().sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    options: LossOptions | None = None,
    num_rows: int | None = None,
    rounded: RoundedHead | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns the cross-entropy summed over the trained rows: an fp32 scalar, 0 when there are none.

    hidden: [N, D]; weight: [V, D]; targets: [N] int64, `ignore_index` where nothing is trained; bias: [V] or None.
    `chunk_tokens`: rows of logits held at once, by default as many as fit `DEFAULT_CHUNK_BYTES` (with Triton
    `TRITON_CHUNK_BYTES`, or half the bytes of a trained head's fp32 gradient if those are more). `num_rows`: rows that
    run through the head, which may be no fewer than are trained; others run along and their results are dropped. No
    size then depends on the targets, as a CUDA graph needs. None: as many as are trained, for which the host waits.
    Under autocast the matmuls run in its dtype. `rounded`: the weight in fp8, by which both products then run; weight
    and bias must be frozen. `implementation`: "reference" or "triton". ValueError for an unknown one, or if a head in
    fp8 would be trained.
    """
    setting = make_setting(hidden, weight, chunk_tokens, ignore_index, options, check_implementation(implementation))
    setting = setting._replace(num_rows=num_rows, rounded=rounded)
    if (
        rounded is not None
        and torch.is_grad_enabled()
        and any(one is not None and one.requires_grad for one in (weight, bias))
    ):
        raise ValueError("a head in fp8 is frozen: train it, or round it, but not both")
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, setting, torch.is_grad_enabled())


def token_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    options: LossOptions | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Returns log softmax(z)[target] of every row, fp32 [N], 0 where the target is `ignore_index`.

    The arguments are those of `linear_cross_entropy`; of `options` only logit scale and soft-cap may be set (ValueError
    otherwise). With a frozen head the gradient of hidden is ready after the forward, as each row's only scales with
    that of its log-probability; a trained head computes its logits once more in the backward.
    """
    if options is not None and (options.label_smoothing or options.z_loss):
        raise ValueError("label_smoothing and z_loss change the loss, not the log-probabilities")
    setting = make_setting(hidden, weight, chunk_tokens, ignore_index, options, check_implementation(implementation))
    return _TokenLogProbabilities.apply(hidden, weight, bias, targets, setting, torch.is_grad_enabled())


def make_setting(  # noqa: PLR0917 - in the order of the public arguments
    hidden: Tensor,
    weight: Tensor,
    chunk_tokens: int | None,
    ignore_index: int,
    options: LossOptions | None,
    triton: bool,
) -> _Setting:
    """Returns how the loss of these tensors runs; `chunk_tokens` None: as many as fit the implementation's budget."""
    if chunk_tokens is None and triton:
        is_trained = weight.requires_grad and torch.is_grad_enabled()
        most = max(TRITON_CHUNK_BYTES, 2 * weight.numel()) if is_trained else TRITON_CHUNK_BYTES
        rows = most // (_working_dtype(hidden).itemsize * weight.shape[0])
        chunk_tokens = rows // 128 * 128 or rows  # matmul tiles have 128 rows
    elif chunk_tokens is None:
        chunk_tokens = DEFAULT_CHUNK_BYTES // (4 * weight.shape[0])
    return _Setting(max(1, chunk_tokens), ignore_index, options or LossOptions(), triton)


def _working_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward, for the inputs that need them."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        setting: _Setting,
        needs_gradients: bool,
    ) -> Tensor:
        """hidden: [N, D], weight: [V, D]; returns the summed loss."""
        dtype = _working_dtype(hidden)
        wants = [needs_gradients and need for need in ctx.needs_input_grad[:3]]
        trained = is_trained = None
        if setting.num_rows is None:
            trained = (targets != setting.ignore_index).nonzero().squeeze(1)
            hidden_rows, targets = hidden.index_select(0, trained), targets[trained]
        else:
            is_trained = (targets != setting.ignore_index).float()
            hidden_rows, targets = hidden, targets.clamp(min=0)
            if setting.num_rows < hidden.shape[0]:
                trained = is_trained.argsort(descending=True, stable=True)[: setting.num_rows]
                hidden_rows, targets, is_trained = (
                    hidden.index_select(0, trained),
                    targets[trained],
                    is_trained[trained],
                )
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden_rows.to(dtype)
            # A copy of our own may be overwritten.
            room = rows if rows.data_ptr() != hidden.data_ptr() else None
            gradients = _Gradients(rows, weight, bias, wants, room=room)
            if setting.rounded is None:
                losses = _chunked_losses(
                    rows, weight.to(dtype), bias, targets, gradients, setting=setting, row_factor=is_trained
                )
            else:
                losses = _rounded_losses(
                    rows, setting.rounded, bias, targets, gradients.hidden, setting=setting, row_factor=is_trained
                )
        if is_trained is not None:
            losses *= is_trained
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.num_rows, ctx.triton = hidden.shape[0], setting.triton
        ctx.save_for_backward(trained, gradients.hidden, gradients.weight, gradients.bias)
        return losses.sum()

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Scales what the forward computed, in place where it can, so that it runs once (RuntimeError at a second
        time); the gradient of hidden gets its untrained rows back as zeros."""
        trained, grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        (grad,) = grads
        if grad_rows is not None:
            grad_rows = grad_rows.mul_(grad).to(ctx.dtypes[0])
            grad_rows = grad_rows if trained is None else _to_all_rows(grad_rows, trained, ctx.num_rows)
        if grad_weight is not None:
            grad_weight = scaled(grad_weight, grad, ctx.dtypes[1], uses_triton=ctx.triton)
        if grad_bias is not None:
            grad_bias = grad_bias * grad
        return grad_rows, grad_weight, grad_bias, None, None, None


class _TokenLogProbabilities(torch.autograd.Function):
    """A row's log-probability is minus its plain loss."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positions
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        setting: _Setting,
        needs_gradients: bool,
    ) -> Tensor:
        """hidden: [N, D], weight: [V, D]; returns [N]."""
        dtype = _working_dtype(hidden)
        ctx.again = needs_gradients and any(ctx.needs_input_grad[1:3])
        wants = [needs_gradients and ctx.needs_input_grad[0] and not ctx.again, False, False]
        trained = (targets != setting.ignore_index).nonzero().squeeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.index_select(0, trained).to(dtype)
            gradients = _Gradients(rows, weight, bias, wants)
            losses = _chunked_losses(rows, weight.to(dtype), bias, targets[trained], gradients, setting=setting)
        ctx.hidden_dtype, ctx.setting, ctx.num_rows = hidden.dtype, setting, hidden.shape[0]
        ctx.save_for_backward(trained, gradients.hidden, *((rows, weight, bias, targets) if ctx.again else ()))
        return _to_all_rows(losses.neg_(), trained, hidden.shape[0])

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Scales the rows that the forward computed, or runs the chunks again when the head is trained."""
        trained, grad_rows, *saved = ctx.saved_tensors
        factor = grads[0][trained].neg()
        grad_weight = grad_bias = None
        if ctx.again:
            rows, weight, bias, targets = saved
            made = _Gradients(rows, weight, bias, ctx.needs_input_grad[:3])
            with torch.autocast(rows.device.type, enabled=False):
                weight = weight.to(rows.dtype)
                _chunked_losses(rows, weight, bias, targets[trained], made, setting=ctx.setting, row_factor=factor)
            grad_rows = made.hidden
            grad_weight = None if made.weight is None else made.weight.to(saved[1].dtype)
            grad_bias = made.bias
        elif grad_rows is not None:
            grad_rows = grad_rows * factor[:, None]
        if grad_rows is not None:
            grad_rows = _to_all_rows(grad_rows.to(ctx.hidden_dtype), trained, ctx.num_rows)
        return grad_rows, grad_weight, grad_bias, None, None, None


def _to_all_rows(values: Tensor, trained: Tensor, num_rows: int) -> Tensor:
    """Values of the trained rows among zeros for the others."""
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, trained, values)


class _Gradients:
    """Buffers for the gradients that are wanted; None for the others.

    `room`: where that of hidden may be written; a chunk's rows are read before their gradient is.
    """

    def __init__(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool], *, room: Tensor | None = None
    ) -> None:
        self.hidden = (torch.empty_like(rows) if room is None else room) if wants[0] else None
        self.weight = torch.empty_like(weight, dtype=torch.float32) if wants[1] else None
        if self.weight is not None and not rows.shape[0]:
            self.weight.zero_()
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None

    def add(self, chunk: slice, h: Tensor, weight: Tensor, p: Tensor) -> None:
        """Adds a chunk's: h [c, D] in the compute dtype, p [c, V], the gradient of its matmul, there or in fp32."""
        if self.bias is not None:
            self.bias += p.sum(0, dtype=torch.float32)
        p = p.to(h.dtype)
        beta = 0 if chunk.start == 0 else 1  # the first is not added to anything: nothing is cleared or read for it
        if self.weight is not None and h.dtype == torch.float32:
            self.weight.addmm_(p.t(), h, beta=beta)
        elif self.weight is not None and h.is_cuda:
            # Summed in fp32 inside the matmul: no [V, D] product in half precision is written and read again.
            torch.addmm(self.weight, p.t(), h, beta=beta, out_dtype=torch.float32, out=self.weight)
        elif self.weight is not None:
            product = p.t() @ h
            self.weight = self.weight.add_(product) if beta else self.weight.copy_(product)
        if self.hidden is not None:
            torch.mm(p, weight, out=self.hidden[chunk])

    def __bool__(self) -> bool:
        return any(buffer is not None for buffer in (self.hidden, self.weight, self.bias))


def _chunked_losses(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    gradients: _Gradients,
    *,
    setting: _Setting,
    row_factor: Tensor | None = None,
) -> Tensor:
    """The losses [n] of trained `rows` [n, D], fp32; their gradients, each row's times its factor, into `gradients`."""
    losses = rows.new_empty(rows.shape[0], dtype=torch.float32)
    # One buffer for all: a new one would be there before the last chunk's is gone.
    buffer = rows.new_empty(min(setting.chunk_tokens, rows.shape[0]), weight.shape[0])
    for start in range(0, rows.shape[0], setting.chunk_tokens):
        chunk = slice(start, min(start + setting.chunk_tokens, rows.shape[0]))
        h = rows[chunk]
        factor = None if row_factor is None else row_factor[chunk]
        logits = torch.mm(h, weight.t(), out=buffer[: h.shape[0]])
        turn = turn_logits_triton if setting.triton else turn_logits_reference
        losses[chunk], p = turn(
            logits, bias, targets[chunk], factor, options=setting.options, with_gradient=bool(gradients)
        )
        if gradients:
            gradients.add(chunk, h, weight, p)
    return losses


def _rounded_losses(
    rows: Tensor,
    head: RoundedHead,
    bias: Tensor | None,
    targets: Tensor,
    grad_rows: Tensor | None,
    *,
    setting: _Setting,
    row_factor: Tensor | None,
) -> Tensor:
    """As `_chunked_losses`, by a head in fp8; the gradients of `rows` go into `grad_rows`, which may be their place."""
    losses = rows.new_empty(rows.shape[0], dtype=torch.float32)
    # All of them first: a chunk's gradients may take the place of its rows.
    rounded = quantize_rows(rows, implementation="triton" if setting.triton else "reference")
    size, vocabulary = min(setting.chunk_tokens, rows.shape[0]), head.values.shape[0]
    buffer = rows.new_empty(size, vocabulary, dtype=torch.bfloat16)
    room = None if grad_rows is None else empty_rounded(size, vocabulary, rows.device)
    turn = turn_rounded_triton if setting.triton else turn_rounded_reference
    for start in range(0, rows.shape[0], setting.chunk_tokens):
        chunk = slice(start, min(start + setting.chunk_tokens, rows.shape[0]))
        values, row_scale = rounded.values[chunk], rounded.scale[chunk] * head.scale
        logits = head.logits(values, out=buffer[: values.shape[0]])
        gradient = None if room is None else Rounded(room.values[: values.shape[0]], room.scale[: values.shape[0]])
        factor = None if row_factor is None else row_factor[chunk]
        losses[chunk] = turn(logits, row_scale, bias, targets[chunk], factor, options=setting.options, out=gradient)
        if gradient is not None and grad_rows is not None:
            product = head.hidden_gradient(gradient.values)
            torch.mul(product, gradient.scale * head.scale, out=grad_rows[chunk])
    return losses
