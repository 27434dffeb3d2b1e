"""The short causal convolution of state-space models."""

import pytest
import torch
from torch.nn import functional as F

from stoker.kernels.causal_conv import causal_conv, causal_conv_cached

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, length, channels, width, documents): a program takes 16 positions.
SHAPES = [
    (2, 37, 5, 4, ((20, 1, 16), (3, 34))),
    (1, 2, 70, 4, None),
    (2, 17, 8, 2, None),
    (1, 16, 3, 7, ((16,),)),
]


def conv(implementation, documents, **options):
    def run(x, weight, bias=None):
        return causal_conv(x, weight, bias, document_lengths=documents, implementation=implementation, **options)

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_a_convolution_of_each_document(shape, draw):
    batch, length, channels, width, documents = shape
    x, weight, bias = draw(batch, length, channels), draw(channels, width), draw(channels)
    rows = []
    for row, lengths in zip(x, documents or [(length,)] * batch, strict=True):
        parts = (F.pad(part.t(), (width - 1, 0)) for part in row.split(lengths))
        outputs = [F.conv1d(part, weight.unsqueeze(1), bias, groups=channels).t() for part in parts]
        rows.append(F.silu(torch.cat(outputs)))
    actual = conv("reference", documents)(x, weight, bias)
    torch.testing.assert_close(actual, torch.stack(rows), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_kernel_is_as_exact_as_eager(shape, dtype, draw, assert_as_exact_as_eager):
    batch, length, channels, width, documents = shape
    assert_as_exact_as_eager(
        conv("triton", documents),
        conv("reference", documents),
        [draw(batch, length, channels), draw(channels, width), draw(channels)],
        dtype=dtype,
        factor=4,  # sums of positions in another order
    )


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_kernel_without_bias_or_activation(shape, draw, assert_as_exact_as_eager):
    batch, length, channels, width, documents = shape
    assert_as_exact_as_eager(
        conv("triton", documents, silu=False),
        conv("reference", documents, silu=False),
        [draw(batch, length, channels), draw(channels, width)],
        dtype=torch.float32,
        factor=4,
    )


def test_a_frozen_weight_changes_nothing_else_and_views_are_read_by_their_strides(draw):
    x = draw(2, 20, 24).float()[:, :, 3:11].detach().requires_grad_()
    weight, results = draw(8, 4).float(), []
    for implementation in ("reference", "triton"):
        out = causal_conv(x, weight, implementation=implementation)
        # A sum's gradient is one number expanded, its strides zero.
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_the_weight_s_gradient_is_the_same_in_every_run(draw):
    x, weight = draw(1, 40, 8).float(), draw(8, 4).float().requires_grad_()
    runs = [torch.autograd.grad(conv("triton", None)(x, weight).square().sum(), weight)[0] for _ in range(2)]
    assert torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1, 1, 1), (4, 3), (2, 1, 4)])
def test_cached_parts_equal_the_whole(parts, draw):
    x, weight, bias, window = draw(2, 7, 3), draw(3, 4), draw(3), torch.zeros(2, 3, 3).double()
    outputs = []
    for part in x.split(parts, dim=1):
        out, window = causal_conv_cached(part, window.to(x.device), weight, bias)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), causal_conv(x, weight, bias))
    assert torch.equal(window, x[:, 4:])


def test_lengths_that_do_not_sum_to_the_row_are_refused(draw):
    with pytest.raises(ValueError, match="must hold 1 rows that sum to 4"):
        causal_conv(draw(1, 4, 2), draw(2, 4), document_lengths=((3,),))
