"""Norms and gates that leave their rows in fp8 as well: the values of a pass of its own over what they store."""

import pytest
import torch

from stoker.kernels import fp8, glu, rms_norm, rope, rounded_glu, rounded_rotation
from stoker.kernels.block import KEEP, BlockOptions, BlockWeights, block
from stoker.kernels.projection import Projection
from stoker.quant.fp8 import Fp8Weight


@pytest.fixture(autouse=True)
def has_fp8(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs a GPU of compute capability 8.9 or later")


def assert_is_rounding_of(rounded, values, factor=None):
    expected = fp8.quantize_rows(values, factor, implementation="triton")
    assert torch.equal(rounded.scale, expected.scale)
    assert torch.equal(rounded.values.float(), expected.values.float())
    if values.is_cuda:  # the interpreter rounds to fp8 wrongly where the mantissa carries
        true = values.float() if factor is None else values.float() * factor
        made = rounded.values.float() * rounded.scale
        assert ((made - true).abs() <= 2**-4 * true.abs() + 2**-9 * rounded.scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (2, 70)])
def test_gates_are_as_exact_as_eager_and_in_fp8_too(
    rows, width, activation, dtype, draw, device, monkeypatch, assert_as_exact_as_eager
):
    monkeypatch.setattr(rounded_glu, "BLOCK", 32)  # several pieces, the last of them not full
    factor = draw(2 * width).abs().float()

    def forward(gate_up):
        rounded = fp8.empty_rounded(rows, width, device)
        out = rounded_glu.gated_rounded(gate_up, rounded, activation=activation)
        assert_is_rounding_of(rounded, out)
        return out

    def backward(gate_up, grad):
        rounded = fp8.empty_rounded(rows, 2 * width, device)
        results = rounded_glu.gated_rounded_backward(gate_up, grad, rounded, factor, activation=activation)
        assert results[0] is gate_up
        assert results[1] is grad
        assert_is_rounding_of(rounded, results[0], factor)
        return results

    def eager(gate_up, grad):
        return glu.gated_backward(gate_up, grad, activation=activation)

    inputs, options = [draw(rows, 2 * width), draw(rows, width)], {"dtype": dtype, "gradients": False}
    reference = lambda gate_up: glu.gated_reference(gate_up, activation)  # noqa: E731
    assert_as_exact_as_eager(forward, reference, inputs[:1], **options)
    assert_as_exact_as_eager(backward, eager, inputs, **options)


def test_columns_of_a_wider_tensor_are_read_by_their_stride(draw, device):
    wide = draw(3, 80).float()
    rounded = fp8.empty_rounded(3, 16, device)
    out = rounded_glu.gated_rounded(wide[:, 16:48], rounded)
    torch.testing.assert_close(out, glu.gated_reference(wide[:, 16:48]), rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_and_no_rows(device):
    for rows in (0, 2):
        rounded = fp8.empty_rounded(rows, 16, device)
        assert not rounded_glu.gated_rounded(torch.zeros(rows, 32, device=device), rounded).any()
        assert not rounded.values.float().any()
        assert (rounded.scale > 0).all()


def test_unknown_activation_is_refused(draw, device):
    with pytest.raises(ValueError, match="activation"):
        rounded_glu.gated_rounded(draw(1, 32), fp8.empty_rounded(1, 16, device), activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (5, 100)])
def test_norms_leave_rows_and_gradients_in_fp8_and_change_nothing_else(shape, needs_weight, dtype, draw, device):
    x, residual, grad, grad_total = (draw(*shape).to(dtype) for _ in range(4))
    weight, factor = draw(shape[1]).float(), draw(shape[1]).abs().float()
    rounded = fp8.empty_rounded(*shape, device)
    expected = rms_norm.launch_forward(x, residual, weight, 1e-5)
    actual = rms_norm.launch_forward(x, residual, weight, 1e-5, rounded=rounded)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert_is_rounding_of(rounded, actual[0])
    inputs, needs = (
        (grad, grad_total, actual[1], weight, actual[2]),
        {"needs_input": True, "needs_weight": needs_weight},
    )
    expected = rms_norm.launch_backward(*inputs, **needs)
    actual = rms_norm.launch_backward(*inputs, **needs, rounded=rounded, factor=factor)
    assert torch.equal(actual[0], expected[0])
    assert_is_rounding_of(rounded, actual[0], factor)
    assert (actual[1] is not None) == needs_weight
    if needs_weight:
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(4, 2, 16), (3, 1, 12)])
def test_the_rotation_leaves_its_gradient_in_fp8_and_changes_nothing_else(
    heads, kv_heads, channels, interleaved, dtype, draw, device
):
    grads = [draw(2, 3, count, channels).to(dtype) for count in (heads, kv_heads, kv_heads)]
    angles, width = draw(2, 3, channels // 2).float(), (heads + 2 * kv_heads) * channels
    tables, factor = (angles.cos(), angles.sin()), draw(width).abs().float()
    rounded = fp8.empty_rounded(6, width, device)
    options = {"interleaved": interleaved}
    expected = rope.split_and_rotate_backward(grads, *tables, **options, implementation="triton")
    actual = rounded_rotation.rotate_back_rounded(grads, *tables, rounded, factor, **options)
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-6)  # a GPU may contract products and sums
    if device.type == "cpu":
        assert torch.equal(actual, expected)
    assert_is_rounding_of(rounded, actual.flatten(0, 1), factor)


HEADS, KV_HEADS, CHANNELS, WIDTH, INNER, RANK = 4, 2, 16, 32, 48, 4


def projection(draw, num_in, sizes, *, bias, rate):
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    slices = tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))
    weight = Fp8Weight.quantize(draw(ends[-1], num_in, scale=0.2).bfloat16(), implementation="triton")
    a, b = draw(len(sizes) * RANK, num_in, scale=0.3).float(), draw(ends[-1], RANK, scale=0.3).float()
    offset = draw(ends[-1]).bfloat16() if bias else None
    return Projection(weight, offset, a.requires_grad_(), b.requires_grad_(), 0.5, slices, rate, num_in)


def run_layer(draw, weights, x, **options):
    angles = draw(1, x.shape[1], CHANNELS // 2)
    inputs = [x, *(t for p in weights[2:6] for t in (p.a, p.b))]
    settings = BlockOptions(HEADS, KV_HEADS, (1e-5, 1e-6), implementation="triton", **options)
    y = block(x, angles.cos().float(), angles.sin().float(), weights=weights, options=settings)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def counting(patched):
    """A list that grows by one with each pass that rounds rows."""
    count, plain = [], fp8.quantize_rows

    def quantize_rows(*args, **options):
        count.append(args[0].shape)
        return plain(*args, **options)

    patched.setattr(fp8, "quantize_rows", quantize_rows)
    return count


@pytest.mark.parametrize(
    ("keep", "bias", "rate", "tile_tokens"),
    [
        *[(keep, False, 0.0, None) for keep in KEEP],
        *[(keep, True, 0.0, 3) for keep in KEEP],
        # The interpreter draws masks slowly: where nothing is made again, and where everything is.
        *[(keep, False, 0.25, None) for keep in ("all", "input")],
    ],
)
def test_a_layer_over_fp8_is_the_same_with_rows_rounded_early_or_late(
    keep, bias, rate, tile_tokens, draw, device, monkeypatch
):
    options = {"bias": bias, "rate": rate}
    weights = BlockWeights(
        draw(WIDTH).float(),
        draw(WIDTH).float(),
        projection(draw, WIDTH, (HEADS * CHANNELS, KV_HEADS * CHANNELS, KV_HEADS * CHANNELS), **options),
        projection(draw, HEADS * CHANNELS, (WIDTH,), **options),
        projection(draw, WIDTH, (INNER, INNER), **options),
        projection(draw, INNER, (WIDTH,), **options),
    )
    x = draw(1, 5, WIDTH).bfloat16().requires_grad_()
    results, passes = {}, {}
    angles = draw(1, 5, CHANNELS // 2)
    for early in (True, False):
        monkeypatch.setattr(Fp8Weight, "rounds_early", early)
        with monkeypatch.context() as patched:
            count = counting(patched)
            results[early] = run_layer(lambda *_: angles, weights, x, keep=keep, tile_tokens=tile_tokens)
        passes[early] = len(count)
    assert passes[True] < passes[False]
    if (keep, rate, tile_tokens) == ("all", 0.0, None):
        assert passes == {True: 2, False: 8}  # what attention gives, and the layer's own gradient
    for one, other in zip(results[True], results[False], strict=True):
        assert one.isfinite().all()
        assert other.abs().max() > 0
        if device.type == "cpu":
            assert torch.equal(one, other)
        else:  # two kernels may contract a product and a sum differently
            torch.testing.assert_close(one, other, rtol=2**-5, atol=2**-5 * other.abs().max().item())
