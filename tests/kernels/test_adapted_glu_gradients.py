"""SwiGLU's backward that gives the gradients of the adapters around it."""

import pytest
import torch

from stoker.kernels.adapted_glu_gradients import backward, backward_reference, takes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Both round the same inputs first, whose errors cancel now in one and now in the other: a few values are compared.
FACTOR = 3.0


def tensors(draw, rows, columns, rank):
    """gate_up, grad, product, b, grad_product_down."""
    return [
        draw(rows, 2 * columns),
        draw(rows, columns),
        draw(rows, 2 * rank),
        draw(2 * columns, rank, scale=0.3),
        draw(rows, rank),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "activation"),
    [(70, 150, 3, "silu"), (1, 16, 16, "gelu"), (33, 130, 20, "gelu_tanh")],
)
def test_is_as_exact_as_eager(rows, columns, rank, activation, dtype, draw, assert_as_exact_as_eager):
    options = {"scaling": 0.7, "activation": activation}
    assert_as_exact_as_eager(
        lambda x, grad, *others: backward(x.clone(), grad.clone(), *others, **options, implementation="triton"),
        lambda x, grad, *others: backward_reference(x.clone(), grad.clone(), *others, **options),
        tensors(draw, rows, columns, rank),
        dtype=dtype,
        factor=FACTOR,
        gradients=False,
    )


def test_several_runs_of_rows_are_summed(draw, monkeypatch):
    inputs = [x.float() for x in tensors(draw, 70, 16, 4)]
    whole = backward(*(x.clone() for x in inputs), scaling=1.0, implementation="triton")
    monkeypatch.setattr("stoker.kernels.adapted_glu_gradients.ROWS_A_PROGRAM", 32)
    pieces = backward(*(x.clone() for x in inputs), scaling=1.0, implementation="triton")
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_autograd_agrees(draw):
    """The formulas against autograd over the layers themselves, in fp64."""
    rows, width, inner, rank = 5, 6, 7, 2
    x, a, b = draw(rows, width), draw(2 * rank, width).requires_grad_(), draw(2 * inner, rank).requires_grad_()
    a_down, b_down = draw(rank, inner).requires_grad_(), draw(width, rank)
    base, out_grad = draw(rows, 2 * inner), draw(rows, width)
    product = x @ a.t()
    gate_up = base + 0.5 * torch.cat([product[:, :rank] @ b[:inner].t(), product[:, rank:] @ b[inner:].t()], 1)
    gate, up = gate_up.chunk(2, 1)
    activated = torch.nn.functional.silu(gate) * up
    activated.retain_grad()
    gate_up.retain_grad()
    product.retain_grad()
    ((activated @ a_down.t() @ b_down.t()) * out_grad).sum().backward()
    given = [t.detach().clone() for t in (gate_up, activated.grad, product, b, out_grad @ b_down)]
    result = backward_reference(*given, scaling=0.5)
    expected = (gate_up.grad, product.grad, b.grad.float(), a_down.grad.float())
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_writes_over_gate_up(draw):
    inputs = [x.float() for x in tensors(draw, 3, 16, 2)]
    assert backward(*inputs, scaling=1.0, implementation="triton").gate_up is inputs[0]


@pytest.mark.parametrize(
    ("b", "a_down", "expected"),
    [((64, 4), (4, 32), True), ((64, 4), (8, 32), False), ((32, 4), (4, 32), False), ((64, 33), (33, 32), False)],
)
def test_takes_one_rank_on_gate_up_and_down(b, a_down, expected, draw):
    assert takes(draw(*b), draw(*a_down)) is expected
    assert not takes(None, draw(*a_down))


def test_refuses_what_it_does_not_take(draw):
    inputs = [x.float() for x in tensors(draw, 3, 16, 2)]
    inputs[2] = inputs[2][:, :2]
    with pytest.raises(ValueError, match="adapters of shapes"):
        backward(*inputs, scaling=1.0, implementation="triton")
