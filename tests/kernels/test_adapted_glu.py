"""SwiGLU that adds the updates of the layers around it."""

import pytest
import torch

from stoker.kernels.adapted_glu import Updates, backward, backward_reference, forward, forward_reference, takes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Both round the same inputs first, whose errors cancel now in one and now in the other: a few values are compared.
FACTOR = 3.0
SHAPES = [(70, 150, 3), (1, 16, 16), (33, 130, 20)]  # rows, columns, rank


def adapters(draw, rows, columns, rank):
    return [draw(rows, 2 * rank), draw(2 * columns, rank, scale=0.3), draw(rank, columns)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_forward_is_as_exact_as_eager(rows, columns, rank, dtype, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        lambda x, *tensors: forward(x, Updates(*tensors, 0.7), implementation="triton"),
        lambda x, *tensors: forward_reference(x, Updates(*tensors, 0.7)),
        [draw(rows, 2 * columns), *adapters(draw, rows, columns, rank)],
        dtype=dtype,
        factor=FACTOR,
        gradients=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_backward_is_as_exact_as_eager(rows, columns, rank, dtype, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        lambda x, grad, p, *tensors: backward(x, grad, p, Updates(*tensors, 0.7), implementation="triton"),
        lambda x, grad, p, *tensors: backward_reference(x, grad, p, Updates(*tensors, 0.7)),
        [
            draw(rows, 2 * columns),
            draw(rows, columns),
            draw(rows, rank),
            *adapters(draw, rows, columns, rank),
        ],
        dtype=dtype,
        factor=FACTOR,
        gradients=False,
    )


def test_backward_writes_over_its_inputs(draw):
    gate_up, grad, product = draw(3, 32).float(), draw(3, 16).float(), draw(3, 2).float()
    updates = Updates(*(x.float() for x in adapters(draw, 3, 16, 2)), 1.0)
    grads, activated = backward(gate_up, grad, product, updates, implementation="triton")
    assert grads is gate_up
    assert activated is grad


@pytest.mark.parametrize(
    ("b", "a_down", "expected"),
    [((64, 4), (4, 32), True), ((64, 4), (8, 32), False), ((32, 4), (4, 32), False), ((64, 33), (33, 32), False)],
)
def test_takes_one_rank_on_gate_up_and_down(b, a_down, expected, draw):
    assert takes(draw(*b), draw(*a_down)) is expected
    assert not takes(None, draw(*a_down))
