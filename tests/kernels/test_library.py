"""The opt-in operators: PyTorch's own checks of them, and the same numbers as the functions they stand for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stoker.kernels import glu, library, rms_norm, rope
from stoker.kernels import linear_cross_entropy as loss_room


def cases():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    q, k = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 3, 2, 8, requires_grad=True)
    angles = torch.randn(1, 3, 4)
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.tensor([1, -100, 10, 0, -100])
    return {
        "norm": (
            library._rms_norm,
            (x, weight, 1e-5, "reference"),
            lambda: library.norm(x, weight, 1e-5),
            lambda: rms_norm.rms_norm_reference(x, weight, 1e-5),
            [x, weight],
        ),
        "gated": (
            library._gated,
            (x, "gelu", "reference"),
            lambda: library.gated(x, activation="gelu"),
            lambda: glu.gated_reference(x, "gelu"),
            [x],
        ),
        "rotate": (
            library._rotate,
            (q, k, angles.cos(), angles.sin(), False, "reference"),
            lambda: torch.cat(library.rotate(q, k, angles.cos(), angles.sin()), 2),
            lambda: torch.cat([rope.rotate_reference(t, angles.cos(), angles.sin()) for t in (q, k)], 2),
            [q, k],
        ),
        "loss": (
            library._linear_cross_entropy,
            (hidden, head, targets, -100, True, True, "reference"),
            lambda: library.linear_cross_entropy(hidden, head, targets),
            lambda: loss_room.linear_cross_entropy_reference(hidden, head, targets),
            [hidden, head],
        ),
    }


@pytest.mark.parametrize("name", ["norm", "gated", "rotate", "loss"])
def test_operator_passes_pytorchs_checks_and_gives_the_functions_numbers(name):
    operator, arguments, ours, reference, inputs = cases()[name]
    torch.library.opcheck(operator, arguments)
    actual, expected = ours(), reference()
    torch.testing.assert_close(actual, expected)
    factor = torch.linspace(-1, 1, expected.numel()).view(expected.shape) if expected.ndim else torch.tensor(0.7)
    grads = (torch.autograd.grad((y * factor).sum(), inputs) for y in (actual, expected))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_compiler_sees_one_operator_without_a_break():
    _, _, ours, reference, _ = cases()["loss"]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), reference())


@pytest.mark.parametrize(("trained", "products"), [((), 1), ((0,), 2), ((0, 1), 3)])
def test_products_of_the_loss_are_counted(trained, products):
    tensors = [torch.randn(5, 8), torch.randn(11, 8)]
    for index in trained:
        tensors[index].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        library.linear_cross_entropy(*tensors, torch.arange(5))
    assert counter.get_total_flops() == products * 2 * 5 * 8 * 11
