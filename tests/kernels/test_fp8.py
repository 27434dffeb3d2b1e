"""Row-wise fp8 quantisation and the product of two quantised matrices."""

import pytest
import torch

from stoker.kernels import fp8


def random(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_e4m3(*shape: int, device: torch.device) -> torch.Tensor:
    """Values that e4m3 holds exactly, with 448 in every row, so that the scale of a row is 1."""
    values = random(*shape, device=device).mul(100).clamp(-448, 448).to(fp8.FP8).float()
    values[:, 0] = 448
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (3, 100)])
def test_kernel_quantises_as_the_reference(shape, dtype, device):
    # Values that need no rounding: Triton's interpreter rounds to fp8 wrongly where the mantissa carries.
    row_scale = 2.0 ** torch.arange(-3, shape[0] - 3, device=device)[:, None]
    column_factor = 2.0 ** (torch.arange(shape[1], device=device) % 3 - 1)
    values = random_e4m3(*shape, device=device)
    for factor in (None, column_factor):
        x = (values * row_scale / (1 if factor is None else factor)).to(dtype)
        actual, scale = fp8.quantize_rows(x, factor, implementation="triton")
        assert torch.equal(scale, row_scale)
        assert torch.equal(actual.float(), values)
        expected, expected_scale = fp8.quantize_rows(x, factor)
        assert torch.equal(expected.float(), values)
        assert torch.equal(expected_scale, row_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_rounds_as_the_reference(dtype, device):
    if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("rounding to e4m3 is right only on a GPU of compute capability 8.9 or later")
    x = random(64, 1000, device=device).to(dtype)
    expected, expected_scale = fp8.quantize_rows(x)
    actual, scale = fp8.quantize_rows(x, implementation="triton")
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # The division may differ in its last bit, which moves a value across a rounding boundary once in some 10^5.
    assert (actual.float() != expected.float()).float().mean() < 1e-3
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-3, atol=2**-9)


def test_rows_of_a_view_are_read_by_their_stride(device):
    values = random_e4m3(4, 32, device=device)
    x = torch.zeros(4, 64, device=device)
    x[:, 16:48] = values
    actual, _ = fp8.quantize_rows(x[:, 16:48], implementation="triton")
    assert torch.equal(actual.float(), values)


def test_a_row_of_zeros_stays_zero(device):
    actual, scale = fp8.quantize_rows(torch.zeros(2, 32, device=device), implementation="triton")
    assert not actual.float().any()
    assert (scale > 0).all()


def test_product_equals_that_of_the_dequantised_matrices(device):
    x, x_scale = fp8.quantize_rows(random(32, 64, device=device))
    weight, weight_scale = fp8.quantize_rows(random(48, 64, device=device, seed=1))
    expected = (x.double() * x_scale) @ (weight.double() * weight_scale).T
    for fast in (False, True):
        actual = fp8.scaled_matmul(
            x, weight, x_scale=x_scale, weight_scale=weight_scale, dtype=torch.bfloat16, fast_accumulation=fast
        )
        # bf16 output (2^-9) plus, on the GPU, the tensor core's shortened sums.
        torch.testing.assert_close(actual.double(), expected, rtol=2**-6, atol=2**-5)
