"""Scales of quantised products and low-rank updates in one pass."""

import pytest
import torch

from stoker.kernels import projection as layers
from stoker.kernels.scaled_update import columns_of, scaled_update, scaled_update_reference
from stoker.quant.fp8 import Fp8Weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(("rows", "ends", "rank"), [(70, (64, 96, 144), 3), (5, (150,), 16), (66, (32, 64), 20)])
def test_the_pass_is_as_exact_as_the_formula(rows, ends, rank, has_residual, dtype, draw, assert_as_exact_as_eager):
    scales = draw(rows, 1).abs().float(), draw(ends[-1], 1).abs().float()
    inputs = [draw(rows, ends[-1]), draw(rows, rank * len(ends)), draw(ends[-1], rank), draw(rows, ends[-1])]

    def run(implementation):
        def op(raw, product, b, residual):
            if raw.dtype is torch.float64:
                total = raw * scales[0] * scales[1].T
                parts = product.split(rank, dim=1), b.tensor_split(ends[:-1])
                total += 0.7 * torch.cat([p @ one.T for p, one in zip(*parts, strict=True)], dim=1)
                return total + residual if has_residual else total
            options = {"ends": ends, "scaling": 0.7, "residual": residual if has_residual else None}
            return scaled_update(raw, *scales, product, b, **options, implementation=implementation)

        return op

    assert_as_exact_as_eager(run("triton"), run("reference"), inputs, dtype=dtype, gradients=False)


def test_columns_of_a_may_lie_either_way_and_scales_may_be_missing(draw):
    raw, product, a = draw(40, 48).float(), draw(40, 6).float(), draw(6, 48).float()
    scale = draw(40, 1).float()
    options = {"ends": (48,), "residual": None}
    expected = scaled_update_reference(raw, scale, None, product, a.t(), **options)
    actual = scaled_update(raw.clone(), scale, None, product, a.t(), **options, implementation="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_parts_that_no_tile_can_keep_apart_are_left_to_the_formula():
    assert columns_of((128, 256)) == 128
    assert columns_of((48, 96)) == 16
    assert columns_of((20, 40)) == 0
    assert columns_of((16, 32, 48, 64)) == 0


def test_a_layer_over_fp8_is_the_same_with_its_scales_before_or_after(draw, device, monkeypatch):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need a GPU of compute capability 8.9 or later")
    weight = Fp8Weight.quantize(draw(64, 32, scale=0.1).bfloat16(), implementation="triton")
    a, b = draw(8, 32, scale=0.3).bfloat16(), draw(64, 4, scale=0.3).bfloat16()
    slices = (slice(0, 32), slice(32, 64))
    bias = draw(64).bfloat16()
    whole = layers.Projection(weight, bias, a, b, 0.5, slices)
    single = layers.Projection(weight, None, a[:4], b, 0.5, (slice(0, 64),))
    x, grad, residual = draw(10, 32).bfloat16(), draw(10, 64).bfloat16(), draw(10, 64).bfloat16()
    piece = layers.Piece("triton")

    def results():
        output, product = layers.project(whole, x, piece)
        single_product = layers.product_of(single, x, piece)
        onto = layers.project_onto(single, x, residual, single_product, implementation="triton")
        return output, onto, layers.grad_input(whole, grad, product, piece)

    after = results()
    monkeypatch.setattr(Fp8Weight, "scales_after", False)
    for one, other in zip(after, results(), strict=True):
        assert one.dtype == torch.bfloat16
        # Both round the product to bf16; the two passes of the second round again.
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-6, atol=2**-6 * other.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the tensor core's sums are a GPU's")
def test_fast_sums_over_the_longest_rows_move_a_gradient_less_than_e4m3_does(draw, monkeypatch):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need a GPU of compute capability 8.9 or later")
    generator = torch.Generator("cuda").manual_seed(0)
    full = torch.randn(28672, 4096, device="cuda", generator=generator).bfloat16() * 0.02
    grad = torch.randn(1024, 28672, device="cuda", generator=generator).bfloat16()
    weight = Fp8Weight.quantize(full, implementation="triton")
    errors = {}
    for fast in (False, True):
        monkeypatch.setattr(Fp8Weight, "fast_gradients", fast)
        made, true = weight.matmul_transposed(grad).float(), grad.float() @ full.float()
        errors[fast] = ((made - true).norm() / true.norm()).item()
    assert errors[True] < 0.06
    assert errors[True] - errors[False] < 0.02, errors
