"""Logits to losses and to the gradient of the logits, which takes their place; the formulas are the loss's own
(`linear_cross_entropy`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stoker.kernels.fp8 import FP8_MAX, Rounded, scale_of
from stoker.kernels.triton_support import jit, next_power_of_2, tl, triton

TURN_COLUMNS, TURN_GROUPS = 4096, 2
"""Columns that a program's threads read side by side, and groups of so many that they read at a time."""

TURN_WARPS, TURN_WARPS_ROUNDED = 16, 8
"""A program's warps; with gradients in fp8, a thread must have 16 columns to write at once: with 8, 2.4 ms instead of
0.21 for 1,024 rows of 128,256 logits (H200)."""

SCALE_BLOCK = 8192
"""Values of a trained head's gradient that a program scales and rounds."""


@dataclass(frozen=True)
class LossOptions:
    """Variations of the loss: `logit_scale` s, `soft_cap` (None: none), `label_smoothing` ε and `z_loss` ζ."""

    logit_scale: float = 1.0
    soft_cap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def turn_logits_reference(
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


def turn_logits_triton(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor | None,
    *,
    options: LossOptions,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As `turn_logits_reference`, but in place and in the dtype of `logits`."""
    return _turn(logits, bias, targets, factor, options=options, with_gradient=with_gradient), logits


def turn_rounded_reference(
    logits: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor | None,
    *,
    options: LossOptions,
    out: Rounded | None,
) -> Tensor:
    """Losses [c] of head's outputs [c, V] times `row_scale` [c, 1]; their gradient goes into `out`, in e4m3.

    A row's scale there is 1 / 448 of a bound on its values, which without smoothing and z-loss its target's reaches:
    1 − p_target, times the logit scale. The row's `factor` is in its scale alone. `out` None: no gradient.
    """
    losses, gradient = turn_logits_reference(
        logits.float() * row_scale, bias, targets, None, options=options, with_gradient=out is not None
    )
    if out is not None:
        scale = gradient.abs().amax(1, keepdim=True).clamp(min=1e-6) / FP8_MAX
        out.values.copy_((gradient / scale).clamp(-FP8_MAX, FP8_MAX))
        out.scale.copy_(scale if factor is None else scale * factor[:, None])
    return losses


def turn_rounded_triton(
    logits: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor | None,
    *,
    options: LossOptions,
    out: Rounded | None,
) -> Tensor:
    """As `turn_rounded_reference`, reading the logits twice."""
    return _turn(
        logits, bias, targets, factor, options=options, with_gradient=out is not None, row_scale=row_scale, out=out
    )


def _turn(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor | None,
    *,
    options: LossOptions,
    with_gradient: bool,
    row_scale: Tensor | None = None,
    out: Rounded | None = None,
) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    columns = min(TURN_COLUMNS, next_power_of_2(logits.shape[1]))
    _turn_logits_kernel[(logits.shape[0],)](
        logits,
        losses if row_scale is None else row_scale,
        logits if bias is None else bias,
        targets,
        losses if factor is None else factor,
        losses,
        logits if out is None else out.values,
        losses if out is None else out.scale,
        logits.shape[1],
        options.logit_scale,
        1.0 if options.soft_cap is None else options.soft_cap,
        options.label_smoothing,
        options.z_loss,
        COLUMNS=columns,
        GROUPS=TURN_GROUPS,
        HAS_BIAS=bias is not None,
        HAS_CAP=options.soft_cap is not None,
        HAS_FACTOR=factor is not None,
        IS_VARIED=bool(options.label_smoothing or options.z_loss),
        WITH_GRADIENT=with_gradient,
        IS_SCALED=row_scale is not None,
        ROUNDED=out is not None,
        num_warps=max(1, min(TURN_WARPS, columns // 256) if out is None else min(TURN_WARPS_ROUNDED, columns // 512)),
    )
    return losses


@jit
def _logits(  # noqa: PLR0917
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    row_scale: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
) -> tl.tensor:
    z = tl.load(logits_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z = (z * row_scale + tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)) * scale
    else:
        z *= row_scale * scale
    if HAS_CAP:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)  # tanh
    return z


@jit
def _bound(p_target: tl.tensor, smoothing: tl.tensor, more: tl.tensor) -> tl.tensor:
    # Of |p (1 + more) − onehot (1 − ε) − ε / V| over a row: p of any other than the target is at most 1 − p_target.
    apart = tl.maximum(1.0 - p_target, smoothing) * tl.maximum(1.0, tl.abs(1.0 + more))
    return tl.maximum(apart + tl.abs(more) + smoothing, 1e-6)


@jit
def _turn_logits_kernel(  # noqa: PLR0917
    logits_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    num_columns: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    IS_VARIED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    IS_SCALED: tl.constexpr,
    ROUNDED: tl.constexpr,
) -> None:
    # A row a program, read twice: once for the maximum and the sum, once to be replaced by its gradient.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_columns
    out_ptr += row * num_columns
    row_scale = tl.load(row_scale_ptr + row) if IS_SCALED else 1.0
    target = tl.load(targets_ptr + row)
    # Read before the sums below, whose barriers keep every warp's read ahead of any warp's write over this logit.
    z_target = _logits(logits_ptr, bias_ptr, target, target >= 0, row_scale, scale, cap, HAS_BIAS, HAS_CAP)
    # Each thread has a maximum and a sum for each column of its own, that threads need not wait for one another.
    place = tl.arange(0, GROUPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    maxima = tl.full((COLUMNS,), -1e30, tl.float32)  # not -inf: a column may have no logit
    exponentials = tl.zeros((COLUMNS,), tl.float32)
    totals = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_columns, GROUPS * COLUMNS):
        column = start + place
        mask = column < num_columns
        z = _logits(logits_ptr, bias_ptr, column, mask, row_scale, scale, cap, HAS_BIAS, HAS_CAP)
        if IS_VARIED:
            totals += tl.sum(tl.where(mask, z, 0.0), axis=0)
        z = tl.where(mask, z, -float("inf"))
        new_maxima = tl.maximum(maxima, tl.max(z, axis=0))
        exponentials *= tl.exp(maxima - new_maxima)
        exponentials += tl.sum(tl.exp(z - new_maxima[None, :]), axis=0)
        maxima = new_maxima
    maximum = tl.max(maxima, axis=0)
    log_sum = maximum + tl.log(tl.sum(exponentials * tl.exp(maxima - maximum), axis=0))
    loss = log_sum - z_target
    if IS_VARIED:
        loss += smoothing * (z_target - tl.sum(totals, axis=0) / num_columns) + z_loss * log_sum * log_sum
    tl.store(losses_ptr + row, loss)
    if WITH_GRADIENT:
        factor = scale
        row_factor = tl.load(factor_ptr + row) if HAS_FACTOR else 1.0
        if ROUNDED:
            # Known before any value is; that of the row goes into its scale, whose inverse then leaves it out.
            out_scale = scale_of(_bound(tl.exp(z_target - log_sum), smoothing, 2.0 * z_loss * log_sum) * tl.abs(scale))
            tl.store(out_scale_ptr + row, out_scale * row_factor)
            factor /= out_scale
        else:
            factor *= row_factor
        for start in range(0, num_columns, GROUPS * COLUMNS):
            column = start + place
            mask = column < num_columns
            z = _logits(logits_ptr, bias_ptr, column, mask, row_scale, scale, cap, HAS_BIAS, HAS_CAP)
            gradient = tl.exp(z - log_sum)
            if IS_VARIED:
                gradient = gradient * (1.0 + 2.0 * z_loss * log_sum) - smoothing / num_columns
            gradient = tl.where(column == target, gradient - (1.0 - smoothing), gradient) * factor
            if HAS_CAP:
                gradient *= 1.0 - (z / cap) * (z / cap)
            if ROUNDED:
                gradient = tl.minimum(tl.maximum(gradient, -448.0), 448.0)
            tl.store(out_ptr + column, gradient.to(out_ptr.dtype.element_ty), mask=mask)


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype, *, uses_triton: bool) -> Tensor:
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
