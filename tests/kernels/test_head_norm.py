"""Norm of each head and rotation of a fused projection's queries and keys, in one launch."""

import pytest
import torch

from stoker.kernels.head_norm import norm_split_and_rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, length, query heads, key heads, head channels, rows of the tables)
SHAPES = [(2, 3, 4, 2, 16, 1), (1, 5, 3, 1, 6, 1), (2, 2, 40, 8, 8, 2), (1, 1, 1, 1, 2, 1)]


def truth(qkv, q_weight, k_weight, cos, sin, sizes):
    """The formulas in the dtype of qkv, float64 among them."""
    q, k, v = qkv.unflatten(-1, (sum(sizes), -1)).split(sizes, dim=2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        wide = x if x.dtype is torch.float64 else x.float()
        n = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.to(wide)).to(x.dtype).to(wide)
        first, second = n.chunk(2, -1)
        results.append(torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype))
    return *results, v.clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_exact_as_eager_with_every_gradient(shape, dtype, draw, assert_as_exact_as_eager):
    batch, length, heads, kv_heads, channels, rows = shape
    angles = draw(rows, length, channels // 2)
    cos, sin, sizes = angles.cos().float(), angles.sin().float(), (heads, kv_heads, kv_heads)
    options = {"epsilon": 1e-5, "num_heads": heads, "num_kv_heads": kv_heads, "implementation": "triton"}
    assert_as_exact_as_eager(
        lambda *tensors: norm_split_and_rotate(*tensors, cos, sin, **options),
        lambda *tensors: truth(*tensors, cos, sin, sizes),
        [draw(batch, length, sum(sizes) * channels), draw(channels), draw(channels)],
        dtype=dtype,
        factor=3.0,
    )


def test_frozen_weights_cost_no_gradient_and_transposed_gradients_are_read_by_their_strides(draw):
    angles = draw(1, 5, 4)
    cos, sin = angles.cos().float(), angles.sin().float()
    qkv, weights = draw(2, 5, 4 * 8).float().requires_grad_(), (draw(8).float(), draw(8).float())
    options = {"epsilon": 1e-5, "num_heads": 2, "num_kv_heads": 1}
    results = [
        norm_split_and_rotate(qkv, *weights, cos, sin, **options, implementation=name)
        for name in ("reference", "triton")
    ]
    # Attention hands back gradients laid out as [B, H, T, E].
    grads = [draw(2, x.shape[2], 5, 8).float().transpose(1, 2) for x in results[0]]
    expected, actual = (torch.autograd.grad(outputs, qkv, grads)[0] for outputs in results)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_tables_of_another_width_are_refused(draw):
    cos = draw(1, 4, 3).float()
    options = {"epsilon": 1e-5, "num_heads": 1, "num_kv_heads": 1, "implementation": "triton"}
    with pytest.raises(ValueError, match="contiguous with 4 columns"):
        norm_split_and_rotate(draw(1, 4, 24).float(), draw(8).float(), draw(8).float(), cos, cos, **options)
