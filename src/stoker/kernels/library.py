"""The kernels as operators that PyTorch's compiler, exporter and FLOP counter see: `torch.ops.stoker.*`.

Nothing in the engine calls them: the dispatcher of a custom operator takes 51 us a call on a CPU where an
`autograd.Function` takes 26, forward alone, and a layer launches a dozen kernels. Import this module to register them,
and call its functions in code that is compiled, exported or counted.

Each operator is its kernel's room without change; gradients are operators of their own, first derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stoker.kernels import glu, rms_norm, rope
from stoker.kernels.linear_cross_entropy import LinearCrossEntropy, LossOptions, make_setting
from stoker.kernels.triton_support import as_rows, check_implementation


@torch.library.custom_op("stoker::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, implementation: str) -> Tensor:
    return rms_norm.rms_norm(x, weight, epsilon, implementation=implementation)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float, implementation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("stoker::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, implementation: str
) -> tuple[Tensor, Tensor]:
    rows, grads = as_rows(x), as_rows(grad.contiguous())
    wide = rows.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + epsilon)
    if check_implementation(implementation) and x.shape[-1] <= rms_norm.MAX_ROW_BLOCK:
        grad_x, grad_weight = rms_norm.launch_backward(
            grads, None, rows, weight, rstd, needs_input=True, needs_weight=True
        )
        if grad_x is None or grad_weight is None:
            raise RuntimeError("rms_norm: the launch gave no gradient that was asked for")
    else:
        scaled, column = grads.float() * weight.float(), rstd[:, None]
        grad_x = column * scaled - column.pow(3) * (scaled * wide).mean(-1, keepdim=True) * wide
        grad_weight = (grads.float() * wide * column).sum(0)
    return grad_x.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, implementation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.epsilon, ctx.implementation = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_rms_norm_backward(grad, *ctx.saved_tensors, ctx.epsilon, ctx.implementation), None, None)


_rms_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)


def norm(x: Tensor, weight: Tensor, epsilon: float, *, implementation: str = "reference") -> Tensor:
    """As `rms_norm.rms_norm`: x [..., D], weight [D]."""
    return _rms_norm(x, weight, epsilon, implementation)


@torch.library.custom_op("stoker::gated", mutates_args=())
def _gated(gate_up: Tensor, activation: str, implementation: str) -> Tensor:
    return glu.gated(gate_up, activation=activation, implementation=implementation)


@_gated.register_fake
def _(gate_up: Tensor, activation: str, implementation: str) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("stoker::gated_backward", mutates_args=())
def _gated_backward(grad: Tensor, gate_up: Tensor, activation: str, implementation: str) -> Tensor:
    # The kernel writes over both.
    rows, grads = (as_rows(t).clone(memory_format=torch.contiguous_format) for t in (gate_up, grad))
    result, _ = glu.gated_backward(rows, grads, activation=activation, implementation=implementation)
    return result.view(gate_up.shape)


@_gated_backward.register_fake
def _(grad: Tensor, gate_up: Tensor, activation: str, implementation: str) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.activation, ctx.implementation = inputs
    ctx.save_for_backward(gate_up)


def _gate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gated_backward(grad, *ctx.saved_tensors, ctx.activation, ctx.implementation), None, None


_gated.register_autograd(_gate_gradients, setup_context=_keep_gate)


def gated(gate_up: Tensor, *, activation: str = "silu", implementation: str = "reference") -> Tensor:
    """As `glu.gated`: [..., 2F] to [..., F]."""
    return _gated(gate_up, activation, implementation)


@torch.library.custom_op("stoker::rotate", mutates_args=())
def _rotate(  # noqa: PLR0917 - an operator's arguments have places
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    turned = rope.rotate(q, k, cos, sin, interleaved=interleaved, implementation=implementation)
    # An operator's results share no memory.
    return turned[0].clone(memory_format=torch.contiguous_format), turned[1].clone(
        memory_format=torch.contiguous_format
    )


@_rotate.register_fake
def _(  # noqa: PLR0917
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.implementation = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return (*_rotate(grad_q, grad_k, cos, -sin, ctx.interleaved, ctx.implementation), None, None, None, None)


_rotate.register_autograd(_turn_back, setup_context=_keep_tables)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, implementation: str = "reference"
) -> tuple[Tensor, Tensor]:
    """As `rope.rotate`: q [B, T, H, E], k [B, T, K, E]; the tables have no gradient."""
    return _rotate(q, k, cos, sin, interleaved, implementation)


class _Record:
    """What an `autograd.Function` wants of its context, where there is none."""

    def __init__(self, wants: tuple[bool, ...]) -> None:
        self.needs_input_grad = wants
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps them."""
        self.saved_tensors = tensors


@torch.library.custom_op("stoker::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(  # noqa: PLR0917
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    is_triton = check_implementation(implementation)
    setting = make_setting(hidden, weight, None, ignore_index, LossOptions(), is_triton)
    record = _Record((needs_hidden, needs_weight, False))
    loss = LinearCrossEntropy.forward(record, hidden, weight, None, targets, setting, True)
    grads = LinearCrossEntropy.backward(record, torch.ones_like(loss))
    none = hidden.new_empty(0)
    return loss, none if grads[0] is None else grads[0], weight.new_empty(0) if grads[1] is None else grads[1]


@_linear_cross_entropy.register_fake
def _(  # noqa: PLR0917
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    return (
        hidden.new_empty((), dtype=torch.float32),
        grad_hidden,
        weight.new_empty(weight.shape if needs_weight else (0,)),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[4:6]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    pairs = zip(ctx.needs, ctx.saved_tensors, strict=True)
    return (*((one * grad).to(one.dtype) if needs else None for needs, one in pairs), None, None, None, None, None)


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, implementation: str = "reference"
) -> Tensor:
    """As `linear_cross_entropy.linear_cross_entropy`, plain: hidden [N, D], weight [V, D], targets [N]; fp32 scalar.

    Where gradients are wanted they are made in the forward, hence counted there.
    """
    enabled = torch.is_grad_enabled()
    needs = (enabled and hidden.requires_grad, enabled and weight.requires_grad)
    return _linear_cross_entropy(hidden, weight, targets, ignore_index, *needs, implementation)[0]


@register_flop_formula(torch.ops.stoker.linear_cross_entropy)
def _flops(  # noqa: PLR0917 - the operator's arguments, as shapes
    hidden: torch.Size,
    weight: torch.Size,
    targets: torch.Size,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Products of all rows; which of them are trained, shapes do not tell."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + needs_hidden + needs_weight)
