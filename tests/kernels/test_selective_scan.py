"""Mamba-1's scan: its kernel, its reference, and one position after the other."""

import pytest
import torch

from stoker.kernels.selective_scan import selective_scan, selective_scan_step

# The interpreter takes a second for each and treats both halves alike.
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if torch.cuda.is_available() else [])]
# (batch, length, channels, states, documents): a chunk holds 16 positions.
SHAPES = [
    (2, 37, 3, 3, ((20, 1, 16), (32, 5))),
    (1, 5, 33, 2, None),
    (1, 16, 2, 5, ((16,),)),
]


def arguments(draw, shape):
    batch, length, channels, states, _ = shape
    return [
        draw(batch, length, channels),
        draw(batch, length, channels),
        -draw(channels, states).abs() * 2,
        draw(batch, length, states),
        draw(batch, length, states),
        draw(channels),
        draw(batch, length, channels),
        draw(channels),
        draw(batch, channels, states),
    ]


def scan(implementation, documents=None):
    def run(x, dt, A, B, C, D, z, dt_bias, initial_state):
        return selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            initial_state=initial_state,
            document_lengths=documents,
            implementation=implementation,
        )

    return run


def one_by_one(documents, x, dt, A, B, C, D, z, dt_bias, state):
    outputs, state = [], state.clone()
    for t in range(x.shape[1]):
        for row, lengths in enumerate(documents or ()):
            if t and t in torch.tensor(lengths).cumsum(0):
                state[row] = 0
        position = (v[:, t] for v in (x, dt, B, C, z))
        x_t, dt_t, B_t, C_t, z_t = position
        outputs.append(selective_scan_step(state, x_t, dt_t, A, B_t, C_t, D=D, z=z_t, dt_bias=dt_bias))
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_the_recurrence(shape, draw):
    inputs = arguments(draw, shape)
    expected = one_by_one(shape[-1], *inputs)
    torch.testing.assert_close(scan("reference", shape[-1])(*inputs), expected, rtol=1e-10, atol=1e-10)


def test_reference_equals_transformers(draw):
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    x, dt, A, B, C, D, z, bias, state = (v.float() for v in arguments(draw, SHAPES[0]))
    swapped = (v.transpose(1, 2) for v in (x, dt, B, C, z))
    x_t, dt_t, B_t, C_t, z_t = swapped
    y, end = mamba.mamba_selective_scan(
        x_t, dt_t, A, B_t, C_t, D, z=z_t, delta_bias=bias, delta_softplus=True, return_last_state=True
    )
    actual = scan("reference")(x, dt, A, B, C, D, z, bias, torch.zeros_like(state))
    torch.testing.assert_close(actual, (y.transpose(1, 2), end), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_as_exact_as_eager(dtype, draw, assert_as_exact_as_eager):
    documents = SHAPES[0][-1]
    assert_as_exact_as_eager(
        scan("triton", documents),
        scan("reference", documents),
        arguments(draw, SHAPES[0]),
        dtype=dtype,
        factor=8,  # sums in another order, and softplus and sigmoid from an exponential of a unit or two less
    )


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_kernel_takes_odd_shapes(shape, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        scan("triton", shape[-1]),
        scan("reference", shape[-1]),
        arguments(draw, shape),
        dtype=torch.float32,
        factor=8,
    )


def test_kernel_takes_the_bare_recurrence_of_views(draw):
    joined = draw(1, 20, 2 * 8 + 2 * 2).float().requires_grad_()
    A, results = -torch.ones(8, 2, device=joined.device), []
    for implementation in ("reference", "triton"):
        x, dt, B, C = joined.split((8, 8, 2, 2), dim=-1)
        y, _ = selective_scan(x, dt, A, B, C, implementation=implementation)
        # A sum's gradient is one number expanded, its strides zero.
        results.append((y, *torch.autograd.grad(y.sum(), joined)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_steps_of_a_ten_thousandth_keep_their_digits(draw):
    x, B, C = draw(1, 3, 2).float(), draw(1, 3, 2).float(), draw(1, 3, 2).float()
    dt, A = torch.full_like(x, -9.3), -torch.ones(2, 2, device=x.device)
    expected, _ = selective_scan(x.double(), dt.double(), A.double(), B.double(), C.double())
    actual, _ = selective_scan(x, dt, A, B, C, implementation="triton")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def test_two_runs_agree_bit_for_bit(draw):
    inputs = [v.bfloat16().requires_grad_() for v in arguments(draw, SHAPES[2])]
    runs = [torch.autograd.grad(scan("triton")(*inputs)[0].float().square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_documents_do_not_leak(draw):
    inputs = [v.float() for v in arguments(draw, (1, 24, 2, 2, None))]
    y, _ = scan("triton", ((18, 6),))(*inputs)
    inputs[0][:, :18] = 1e3
    assert torch.equal(scan("triton", ((18, 6),))(*inputs)[0][:, 18:], y[:, 18:])
