"""The head's matmul and the cross-entropy in one: the [N, V] logits never exist at once.

    z = cap · tanh(s (h Wᵀ + b) / cap)         (s: logit scale; without a cap z = s (h Wᵀ + b))
    L = log Σ_v exp z_v                        loss = L − (1 − ε) z_target − ε mean_v(z) + ζ L²      (a row's)
    dz = softmax(z) (1 + 2 ζ L) − (1 − ε) onehot(target) − ε / V
    p = dz · s (1 − (z / cap)²)                dh = p W        dW = pᵀ h        db = Σ_n p

ε is label smoothing (arXiv:1512.00567), ζ the z-loss (PaLM, arXiv:2204.02311), the cap that of Gemma 2
(arXiv:2408.00118). Rows whose target is `ignore_index` are left out before the first matmul. The rest runs in chunks;
since the loss is the last thing that a forward computes, each chunk's gradients are computed while its logits are at
hand (the idea of Liger-Kernel, arXiv:2410.10989), and the backward only multiplies them by the incoming scalar. A
weight that is frozen costs no gradient matmul. The sums are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stoker.kernels.triton_support import check_implementation, jit, next_power_of_2, tl, triton

DEFAULT_CHUNK_BYTES = 32 * 2**20
"""Logits held at once by default, in bytes of fp32. Fewer mean fewer rows a chunk, and each reads the whole weight:
on a CPU core, 512 rows of D 1024 and V 32000 took 0.52 s at 32 MiB and 0.94 s at 4 MiB."""

TRITON_CHUNK_BYTES = 256 * 2**20
"""The same for Triton, in bytes of the working dtype: enough rows to keep a large GPU's matmul busy.

A trained head has a gradient in fp32, which each chunk reads and writes as a whole: with chunks of half its bytes that
traffic stays below that of the chunks themselves (1B's head, 16,384 rows, by arithmetic: 17 GB instead of 34)."""

TURN_BLOCK, TURN_WARPS = 4096, 8
"""Columns that a program turns at a time, and its warps."""

SCALE_BLOCK = 8192
"""Values of a trained head's gradient that a program scales and rounds."""


@dataclass(frozen=True)
class LossOptions:
    """Variations of the loss: `logit_scale` s, `soft_cap` (None: none), `label_smoothing` ε and `z_loss` ζ."""

    logit_scale: float = 1.0
    soft_cap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class _Setting(NamedTuple):
    """How chunks run: rows held at once, the target that trains nothing, the loss's variations, the implementation.

    `num_rows`: as `linear_cross_entropy` takes it.
    """

    chunk_tokens: int
    ignore_index: int
    options: LossOptions
    triton: bool
    num_rows: int | None = None


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
    implementation: str = "reference",
) -> Tensor:
    """Returns the cross-entropy summed over the trained rows: an fp32 scalar, 0 when there are none.

    hidden: [N, D]; weight: [V, D]; targets: [N] int64, `ignore_index` where nothing is trained; bias: [V] or None.
    `chunk_tokens`: rows of logits held at once, by default as many as fit `DEFAULT_CHUNK_BYTES` (with Triton
    `TRITON_CHUNK_BYTES`, or half the bytes of a trained head's fp32 gradient if those are more). `num_rows`: rows that
    run through the head, which may be no fewer than are trained; others run along and their results are dropped. No
    size then depends on the targets, as a CUDA graph needs. None: as many as are trained, for which the host waits.
    Under autocast the matmuls run in its dtype. `implementation`: "reference" or "triton"; ValueError for an unknown
    one.
    """
    setting = make_setting(hidden, weight, chunk_tokens, ignore_index, options, check_implementation(implementation))
    setting = setting._replace(num_rows=num_rows)
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
            losses = _chunked_losses(
                rows, weight.to(dtype), bias, targets, gradients, setting=setting, row_factor=is_trained
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
            grad_weight = _scaled(grad_weight, grad, ctx.dtypes[1], uses_triton=ctx.triton)
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
        turn = _turn_logits_triton if setting.triton else _turn_logits_reference
        losses[chunk], p = turn(
            logits, bias, targets[chunk], factor, options=setting.options, with_gradient=bool(gradients)
        )
        if gradients:
            gradients.add(chunk, h, weight, p)
    return losses


def _turn_logits_reference(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor | None,
    *,
    options: LossOptions,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [c] of the head's outputs [c, V], and the gradient of those (fp32), which takes the place of `logits`."""
    logits = logits.float()
    if bias is not None:
        logits += bias
    if options.logit_scale != 1.0:
        logits *= options.logit_scale
    slope = None
    if options.soft_cap is not None:
        logits.div_(options.soft_cap).tanh_()
        slope = 1 - logits.square() if with_gradient else None
        logits *= options.soft_cap
    target, smoothing = targets[:, None], options.label_smoothing
    # In place and with one exponential a logit; the loss without ζ is the same for logits less their largest.
    largest = logits.amax(-1, keepdim=True)
    logits -= largest
    loss = (smoothing - 1) * logits.gather(1, target)
    if smoothing:
        loss -= smoothing * logits.mean(-1, keepdim=True)
    total = logits.exp_().sum(-1, keepdim=True)
    log_total = total.log()
    loss += log_total
    log_sum = log_total + largest
    if options.z_loss:
        loss += options.z_loss * log_sum.square()
    if with_gradient:
        logits /= total
        if options.z_loss:
            logits *= 1 + 2 * options.z_loss * log_sum
        logits.scatter_add_(1, target, torch.full_like(log_sum, smoothing - 1))
        if smoothing:
            logits -= smoothing / logits.shape[1]
        if slope is not None:
            logits *= slope
        if options.logit_scale != 1.0:
            logits *= options.logit_scale
        if factor is not None:
            logits *= factor[:, None]
    return loss.squeeze(1), logits


@jit
def _capped(logit: tl.tensor, bias: tl.tensor, scale: tl.tensor, cap: tl.tensor, HAS_CAP: tl.constexpr) -> tl.tensor:
    z = (logit.to(tl.float32) + bias) * scale
    if HAS_CAP:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)  # tanh
    return z


@jit
def _turn_logits_kernel(  # noqa: PLR0917
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    num_columns: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
) -> None:
    # A row a program, read twice: once for the maximum and the sum, once to be replaced by its gradient.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_columns
    target = tl.load(targets_ptr + row)
    # Read before the sums below, whose barriers keep every warp's read ahead of any warp's write over this logit.
    target_bias = tl.load(bias_ptr + target).to(tl.float32) if HAS_BIAS else 0.0
    z_target = _capped(tl.load(logits_ptr + target), target_bias, scale, cap, HAS_CAP)
    maximum = -float("inf")
    exponentials, total = 0.0, 0.0
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_columns
        bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        z = _capped(tl.load(logits_ptr + column, mask=mask, other=0.0), bias, scale, cap, HAS_CAP)
        total += tl.sum(tl.where(mask, z, 0.0), axis=0)
        z = tl.where(mask, z, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(z, axis=0))
        exponentials = exponentials * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(z - new_maximum), axis=0)
        maximum = new_maximum
    log_sum = maximum + tl.log(exponentials)
    loss = log_sum - (1.0 - smoothing) * z_target - smoothing * (total / num_columns) + z_loss * log_sum * log_sum
    tl.store(losses_ptr + row, loss)
    if WITH_GRADIENT:
        factor = scale
        if HAS_FACTOR:
            factor *= tl.load(factor_ptr + row)
        for start in range(0, num_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < num_columns
            bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
            z = _capped(tl.load(logits_ptr + column, mask=mask, other=0.0), bias, scale, cap, HAS_CAP)
            gradient = tl.exp(z - log_sum) * (1.0 + 2.0 * z_loss * log_sum) - smoothing / num_columns
            gradient = tl.where(column == target, gradient - (1.0 - smoothing), gradient) * factor
            if HAS_CAP:
                gradient *= 1.0 - (z / cap) * (z / cap)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def _scaled(values: Tensor, factor: Tensor, dtype: torch.dtype, *, uses_triton: bool) -> Tensor:
    """Returns fp32 `values` times `factor`, a scalar on their device, in place or straight in `dtype`: another [V, D]
    in fp32 would be the largest thing in memory."""
    if dtype == values.dtype:
        return values.mul_(factor)
    result = torch.empty_like(values, dtype=dtype)
    if not uses_triton:
        return torch.mul(values, factor, out=result)
    # PyTorch's own kernel reads and writes two dtypes value by value: 1.2 ms for the head of a 1B, this one 0.4 (H200).
    count = values.numel()
    _scale_kernel[(triton.cdiv(count, SCALE_BLOCK),)](
        values, factor.float(), result, count, BLOCK=SCALE_BLOCK, num_warps=8
    )
    return result


@jit
def _scale_kernel(
    values_ptr: tl.tensor, factor_ptr: tl.tensor, result_ptr: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    scaled = tl.load(values_ptr + place, mask=mask, other=0.0) * tl.load(factor_ptr)
    tl.store(result_ptr + place, scaled.to(result_ptr.dtype.element_ty), mask=mask)


def _turn_logits_triton(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor | None,
    *,
    options: LossOptions,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As `_turn_logits_reference`, but in place and in the dtype of `logits`."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = min(TURN_BLOCK, next_power_of_2(logits.shape[1]))
    _turn_logits_kernel[(logits.shape[0],)](
        logits,
        logits if bias is None else bias,
        targets,
        losses if factor is None else factor,
        losses,
        logits.shape[1],
        options.logit_scale,
        1.0 if options.soft_cap is None else options.soft_cap,
        options.label_smoothing,
        options.z_loss,
        BLOCK=block,
        HAS_BIAS=bias is not None,
        HAS_CAP=options.soft_cap is not None,
        HAS_FACTOR=factor is not None,
        WITH_GRADIENT=with_gradient,
        num_warps=max(1, min(TURN_WARPS, block // 512)),
    )
    return losses, logits
