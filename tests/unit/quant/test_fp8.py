import pytest
import torch

from stoker.quant.fp8 import MAX_RELATIVE_ERROR, Fp8Weight, product_error, relative_error
from stoker.quant.frozen import Scratch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_value_is_within_half_a_step_of_e4m3():
    weight = random(32, 48)
    dequantized = Fp8Weight.quantize(weight).dequantize(dtype=torch.float32)
    # Three mantissa bits: half a step is 2^-4 of the value, or half of the smallest step (2^-9) in units of the scale.
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    assert ((dequantized - weight).abs() <= torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * 1.001).all()


@pytest.mark.parametrize("keep_transposed", [True, False])
@pytest.mark.parametrize("scratch", [None, Scratch()])
def test_products_come_within_the_rounding_of_their_inputs(keep_transposed, scratch):
    weight, x, grad = random(32, 48), random(2, 8, 48, seed=1), random(2, 8, 32, seed=2)
    frozen = Fp8Weight.quantize(weight, keep_transposed=keep_transposed, scratch=scratch)
    # Weight and input each round with a relative error of about 2.6% (2^-4 at most, uniform over the step).
    for result, expected in ((frozen.matmul(x), x @ weight.T), (frozen.matmul_transposed(grad), grad @ weight)):
        assert result.shape == expected.shape
        assert (result - expected).norm() / expected.norm() < 0.05


def test_rows_of_very_different_size_keep_their_precision():
    # With one scale for the whole matrix the small rows would underflow to zero.
    weight, grad = random(32, 48) * torch.logspace(-4, 4, 32)[:, None], random(8, 32, seed=2)
    frozen = Fp8Weight.quantize(weight)
    x = random(8, 48, seed=1)
    columns = (frozen.matmul(x) - x @ weight.T).norm(dim=0) / (x @ weight.T).norm(dim=0)
    assert columns.max() < 0.2  # about 0.04 each; only 8 rows, so that the worst of 32 columns lies well above
    expected = grad @ weight
    assert (frozen.matmul_transposed(grad) - expected).norm() / expected.norm() < 0.05


def test_relative_error_grows_with_outliers():
    x, weight = random(64, 48, seed=1), random(32, 48)
    calm = relative_error(Fp8Weight.quantize(weight), weight, x)
    x_outlier = x.clone()
    x_outlier[:, 0] *= 1e6
    weight_without = weight.clone()
    weight_without[:, 0] = 0
    wild = relative_error(Fp8Weight.quantize(weight_without), weight_without, x_outlier)
    assert calm < 0.05 < wild


def test_ordinary_weights_and_inputs_stay_well_within_the_bound():
    weight, x = random(64, 128), random(32, 128, seed=1)
    # 2.6% each for weight and input, as each rounds to three mantissa bits.
    assert relative_error(Fp8Weight.quantize(weight), weight, x) == pytest.approx(0.037, abs=0.004)
    assert MAX_RELATIVE_ERROR > 0.041


def test_the_error_of_a_fused_weight_is_that_of_its_worst_part():
    weight, x = random(32, 48), random(16, 48, seed=1)
    expected = x @ weight.T
    expected[:, 24:] *= 2  # as if the last 8 columns came out at half their size
    made = Fp8Weight.quantize(weight)
    assert product_error(made, x, expected, (24, 8)) == pytest.approx(0.5, abs=0.03)
    assert product_error(made, x, expected, (32,)) < 0.45
    expected[0, 0] = float("nan")
    assert not product_error(made, x, expected, (24, 8)) <= 1.0


def test_transposed_copies_come_and_go_and_change_no_bit():
    weight, grad = Fp8Weight.quantize(random(32, 48)), random(8, 32, seed=2)
    expected, bare = weight.matmul_transposed(grad), weight.num_bytes
    weight.set_transposed(kept=True)
    assert weight.num_bytes == bare + 32 * 48
    assert torch.equal(weight.matmul_transposed(grad), expected)
    weight.set_transposed(kept=False)
    assert weight.num_bytes == bare
    assert torch.equal(weight.matmul_transposed(grad), expected)
