"""The experiment's products with epilogues (benchmarks/fused_kernels.py) beside the formulas."""

import pytest
import torch
from benchmarks import fused_kernels as fused
from benchmarks.fused_kernels import Tile

from stoker.kernels.glu import gated_reference

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="tensor descriptors need Hopper"
)

# Rows, depth and the last tiles of columns are cut; groups of rows are uneven.
WIDE = Tile(32, 64, 32, 4, 2, pieces=4, programs=1, merged=True, group=2, chunk=16)
PAIR = Tile(32, 32, 16, 4, 2, pieces=1, programs=2, merged=False, group=3)
TILES = [WIDE, WIDE._replace(pieces=2), WIDE._replace(pieces=1, chunk=64), PAIR]


def updated(x, weight, product, b, ends):
    """X Wᵀ with each part's update, in the dtype of `x` but for one rounding."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    total = x.to(wide) @ weight.to(wide).t()
    begin, rank = 0, b.shape[1]
    for index, end in enumerate(ends):
        total[:, begin:end] += product[:, index * rank : (index + 1) * rank].to(wide) @ b[begin:end].to(wide).t()
        begin = end
    return total


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("ends", "rank"), [((128, 192, 224), 8), ((80,), 16), ((64, 128), 24)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear_adds_each_part_of_the_update_and_the_residual(
    tile, ends, rank, with_residual, draw, assert_as_exact_as_eager
):
    def kernel(x, weight, product, b, residual):
        return fused.linear(x, weight, product, b, ends=ends, tile=tile, residual=residual if with_residual else None)

    def reference(x, weight, product, b, residual):
        total = updated(x, weight, product, b, ends)
        return (total + residual if with_residual else total).to(x.dtype)

    inputs = [draw(70, 72), draw(ends[-1], 72), draw(70, rank * len(ends)), draw(ends[-1], rank), draw(70, ends[-1])]
    assert_as_exact_as_eager(kernel, reference, inputs, dtype=torch.bfloat16, gradients=False)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rank", [16, 48])
def test_transposed_linear_adds_all_parts_of_the_update(tile, rank, draw, assert_as_exact_as_eager):
    def reference(grad, weight, product, a):
        return updated(grad, weight.t(), product, a.t(), (weight.shape[1],)).to(grad.dtype)

    assert_as_exact_as_eager(
        lambda *tensors: fused.linear_transposed(*tensors, tile=tile),
        reference,
        [draw(70, 72), draw(72, 136), draw(70, rank), draw(rank, 136)],
        dtype=torch.bfloat16,
        gradients=False,
    )


@pytest.mark.parametrize("tile", TILES)
def test_without_an_update_only_the_matrices_are_multiplied(tile, draw, assert_as_exact_as_eager):
    def kernel(x, weight):
        forward = fused.linear(x, weight, None, None, ends=(weight.shape[0],), tile=tile)
        return forward, fused.linear_transposed(forward, weight, None, None, tile=tile)

    def reference(x, weight):
        forward = x @ weight.t()
        return forward, forward @ weight

    inputs = [draw(70, 72), draw(104, 72)]
    assert_as_exact_as_eager(kernel, reference, inputs, dtype=torch.bfloat16, gradients=False)


@pytest.mark.parametrize("tile", TILES)
def test_gated_linear_writes_gate_up_and_their_activation(tile, draw, assert_as_exact_as_eager):
    def reference(x, weight, product, b):
        gate_up = updated(x, weight, product, b, (128, 256)).to(x.dtype)
        return gate_up, gated_reference(gate_up)

    assert_as_exact_as_eager(
        lambda x, weight, product, b: fused.gated_linear(x, weight, product, fused.side_by_side(b), tile=tile),
        reference,
        [draw(70, 72, scale=0.3), draw(256, 72, scale=0.3), draw(70, 32, scale=0.3), draw(256, 16, scale=0.3)],
        dtype=torch.bfloat16,
        gradients=False,
    )


@pytest.mark.parametrize("tile", TILES)
def test_backward_of_the_gate_is_that_of_autograd(tile, draw, assert_as_exact_as_eager):
    def reference(grad, weight, product, a, gate_up):
        leaf = gate_up.detach().requires_grad_()
        activated = gated_reference(leaf)
        grad_activated = updated(grad, weight.t(), product, a.t(), (128,)).to(grad.dtype)
        return torch.autograd.grad(activated, leaf, grad_activated)[0], activated.detach()

    assert_as_exact_as_eager(
        lambda *tensors: fused.gated_linear_backward(*tensors, tile=tile),
        reference,
        [draw(70, 72), draw(72, 128, scale=0.3), draw(70, 16), draw(16, 128, scale=0.3), draw(70, 256)],
        dtype=torch.bfloat16,
        gradients=False,
    )


def test_what_tiles_cannot_hold_is_refused(draw):
    x, weight = draw(32, 64).bfloat16(), draw(96, 64).bfloat16()
    with pytest.raises(ValueError, match=r"end at \(48, 96\)"):
        fused.linear(x, weight, None, None, ends=(48, 96), tile=PAIR)
    with pytest.raises(ValueError, match="48 columns of gate"):
        fused.gated_linear(x, weight, None, None, tile=WIDE)
    with pytest.raises(ValueError, match="16 bytes"):
        fused.linear(draw(32, 68).bfloat16()[:, :64], weight, None, None, ends=(96,), tile=PAIR)
