"""RoPE's kernel: queries and keys of a fused projection, or on their own, in one launch."""

import pytest
import torch

from stoker.kernels.rope import rotate, rotate_reference, split_and_rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, length, query heads, key heads, head channels, rows of the tables)
SHAPES = [(2, 3, 4, 2, 16, 1), (1, 5, 3, 1, 6, 1), (2, 2, 40, 8, 8, 2), (1, 1, 1, 1, 2, 1), (3, 2, 2, 2, 20, 3)]


def tables(draw, batch, length, half):
    angles = draw(batch, length, half)
    return angles.cos().float(), angles.sin().float()


def turn(x, cos, sin, *, interleaved=False):
    if x.dtype is not torch.float64:
        return rotate_reference(x, cos, sin, interleaved=interleaved)
    dim = 2 * cos.shape[-1]
    first, second = (x[..., :dim:2], x[..., 1:dim:2]) if interleaved else x[..., :dim].chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., dim:]), dim=-1)


@pytest.mark.parametrize(("unturned", "interleaved"), [(0, False), (0, True), (3, False), (6, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_projection_is_split_and_turned_as_exactly_as_eager(
    shape, dtype, unturned, interleaved, draw, assert_as_exact_as_eager
):
    batch, length, heads, kv_heads, turned, rows = shape
    channels = turned + unturned
    cos, sin = tables(draw, rows, length, turned // 2)

    def reference(qkv):
        parts = qkv.unflatten(-1, (heads + 2 * kv_heads, channels)).split((heads, kv_heads, kv_heads), dim=2)
        return *(turn(part, cos, sin, interleaved=interleaved) for part in parts[:2]), parts[2].clone()

    options = {"num_heads": heads, "num_kv_heads": kv_heads, "interleaved": interleaved}
    assert_as_exact_as_eager(
        lambda qkv: split_and_rotate(qkv, cos, sin, **options, implementation="triton"),
        reference,
        [draw(batch, length, (heads + 2 * kv_heads) * channels)],
        dtype=dtype,
    )


@pytest.mark.parametrize(("half", "interleaved"), [(8, False), (4, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_on_their_own_are_as_exact_as_eager(dtype, half, interleaved, draw, assert_as_exact_as_eager):
    cos, sin = tables(draw, 1, 3, half)
    assert_as_exact_as_eager(
        lambda q, k: rotate(q, k, cos, sin, interleaved=interleaved, implementation="triton"),
        lambda q, k: tuple(turn(x, cos, sin, interleaved=interleaved) for x in (q, k)),
        [draw(2, 3, 4, 16), draw(2, 3, 2, 16)],
        dtype=dtype,
    )


def test_views_and_transposed_gradients_are_read_by_their_strides(draw):
    cos, sin = tables(draw, 1, 5, 4)
    wide = draw(2, 7, 48).float()
    qkv = wide[:, 1:6, 8:40].detach().requires_grad_()
    options = {"num_heads": 2, "num_kv_heads": 1}
    expected = split_and_rotate(qkv, cos, sin, **options)
    actual = split_and_rotate(qkv, cos, sin, **options, implementation="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # one multiply-add fused or not
    # Attention hands back gradients laid out as [B, H, T, E].
    grads = [draw(2, x.shape[2], 5, 8).float().transpose(1, 2) for x in actual]
    grad_of = [torch.autograd.grad(outputs, qkv, grads)[0] for outputs in (expected, actual)]
    torch.testing.assert_close(grad_of[1], grad_of[0], rtol=1e-6, atol=1e-6)


def test_turning_there_and_back_changes_nothing(draw):
    cos, sin = tables(draw, 1, 4, 8)
    q, k = draw(1, 4, 2, 16).float(), draw(1, 4, 1, 16).float()
    there = rotate(q, k, cos, sin, implementation="triton")
    back = rotate(*there, cos, -sin, implementation="triton")
    torch.testing.assert_close(back, (q, k), rtol=1e-5, atol=1e-6)  # cos² + sin² in float32


def test_tables_of_the_wrong_width_are_refused(draw):
    cos, sin = tables(draw, 1, 4, 9)
    with pytest.raises(ValueError, match="contiguous with at most 8 columns"):
        rotate(draw(1, 4, 2, 16), draw(1, 4, 1, 16), cos, sin, implementation="triton")
