"""Mamba-2's scan: its kernel, its reference, and one position after the other."""

import pytest
import torch

from stoker.kernels.chunked_scan import chunked_scan, chunked_scan_step

# The interpreter takes a second for each and treats both halves alike.
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if torch.cuda.is_available() else [])]
# (batch, length, heads, groups, channels, states, documents): a chunk holds 64 positions, of float32 32.
SHAPES = [
    (2, 70, 4, 2, 8, 20, ((20, 1, 49), (64, 6))),
    (1, 5, 3, 1, 20, 4, None),
    (1, 97, 2, 1, 4, 3, ((97,),)),
]


def arguments(draw, shape, *, channel_skip=False):
    batch, length, heads, groups, channels, states, _ = shape
    return [
        draw(batch, length, heads, channels),
        draw(batch, length, heads),
        -draw(heads).abs() * 2,
        draw(batch, length, groups, states),
        draw(batch, length, groups, states),
        draw(heads, channels) if channel_skip else draw(heads),
        draw(heads),
        draw(batch, heads, channels, states),
    ]


def scan(implementation, documents=None, **options):
    def run(x, dt, A, B, C, D, dt_bias, initial_state):
        return chunked_scan(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            dt_bias=dt_bias,
            initial_state=initial_state,
            document_lengths=documents,
            implementation=implementation,
            **options,
        )

    return run


def one_by_one(documents, x, dt, A, B, C, D, dt_bias, state):
    outputs, state = [], state.clone()
    for t in range(x.shape[1]):
        for row, lengths in enumerate(documents or ()):
            if t and t in torch.tensor(lengths).cumsum(0):
                state[row] = 0
        outputs.append(chunked_scan_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D, dt_bias=dt_bias))
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_the_recurrence(shape, draw):
    inputs = arguments(draw, shape)
    expected = one_by_one(shape[-1], *inputs)
    torch.testing.assert_close(scan("reference", shape[-1])(*inputs), expected, rtol=1e-10, atol=1e-10)


def test_reference_equals_transformers(draw):
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    x, dt, A, B, C, D, bias, state = (v.float() for v in arguments(draw, SHAPES[0]))
    expected = mamba2.mamba2_chunk_scan(
        x, dt, A, B, C, 16, D=D, dt_bias=bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    torch.testing.assert_close(scan("reference")(x, dt, A, B, C, D, bias, state), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_as_exact_as_eager(dtype, draw, assert_as_exact_as_eager):
    shape = SHAPES[0]
    options = {"documents": shape[-1], "dt_limits": (0.1, 2.0)}
    inputs = arguments(draw, shape)
    # Sums in another order; of half precision, the operands of products too are rounded, which eager computes wide.
    assert_as_exact_as_eager(scan("triton", **options), scan("reference", **options), inputs, dtype=dtype, factor=4)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_kernel_takes_odd_shapes_and_a_skip_a_channel(shape, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        scan("triton", shape[-1]),
        scan("reference", shape[-1]),
        arguments(draw, shape, channel_skip=True),
        dtype=torch.float32,
        factor=4,  # sums of a chunk in another order
    )


def test_kernel_reads_views_and_gives_views_their_gradients(draw):
    joined = draw(1, 20, 2 * 8 + 2 * 16 + 2).float().requires_grad_()
    A, results = -torch.ones(2, device=joined.device), []
    for implementation in ("reference", "triton"):
        x, B, C, dt = joined.split((16, 16, 16, 2), dim=-1)
        x, B, C = x.unflatten(-1, (2, 8)), B.unflatten(-1, (1, 16)), C.unflatten(-1, (1, 16))
        y, _ = chunked_scan(x, dt, A, B, C, implementation=implementation)
        # A sum's gradient is one number expanded, its strides zero.
        results.append((y, *torch.autograd.grad(y.sum(), joined)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_two_runs_agree_bit_for_bit(draw):
    inputs = [v.bfloat16().requires_grad_() for v in arguments(draw, SHAPES[1])]
    runs = [torch.autograd.grad(scan("triton")(*inputs)[0].float().square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_in_two_parts_equals_the_whole(draw):
    inputs = [v.float() for v in arguments(draw, SHAPES[0])]
    *head, state = inputs
    first, last = ([v[:, part] if v.ndim > 2 else v for v in head] for part in (slice(0, 33), slice(33, 70)))
    y_first, between = scan("triton")(*first, state)
    y_last, end = scan("triton")(*last, between)
    expected = scan("triton")(*inputs)
    torch.testing.assert_close((torch.cat((y_first, y_last), dim=1), end), expected, rtol=1e-4, atol=1e-4)


def test_documents_do_not_leak(draw):
    inputs = [v.float() for v in arguments(draw, (1, 60, 2, 1, 4, 8, None))]
    y, _ = scan("triton", ((25, 35),))(*inputs)
    inputs[0][:, :25] = 1e3
    assert torch.equal(scan("triton", ((25, 35),))(*inputs)[0][:, 25:], y[:, 25:])


def test_heads_wider_than_a_tile_are_refused(draw):
    with pytest.raises(ValueError, match="heads of 200 channels"):
        scan("triton")(*arguments(draw, (1, 2, 1, 1, 200, 4, None)))
