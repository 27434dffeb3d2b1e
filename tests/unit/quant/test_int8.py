import torch

from stoker.quant.frozen import Scratch
from stoker.quant.int8 import Int8Weight


def random_weight() -> torch.Tensor:
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


def test_every_value_is_within_half_a_level():
    weight = random_weight()
    frozen = Int8Weight.quantize(weight)
    error = (frozen.dequantize(dtype=torch.float32) - weight).abs()
    assert (error <= weight.abs().amax(dim=1, keepdim=True) / 127 / 2 * (1 + 1e-5)).all()
    assert frozen.num_bytes == 24 * 40 + 24 * 4


def test_a_row_of_zeros_stays_zero():
    weight = random_weight()
    weight[3] = 0
    assert not Int8Weight.quantize(weight).dequantize(dtype=torch.float32)[3].any()


def test_dequantises_into_a_buffer_in_its_dtype():
    frozen = Int8Weight.quantize(random_weight())
    out = torch.empty(24, 40, dtype=torch.bfloat16)
    assert frozen.dequantize(out, dtype=torch.bfloat16) is out
    assert torch.equal(out, frozen.dequantize(dtype=torch.float32).bfloat16())


def test_products_use_the_dequantised_weight():
    frozen = Int8Weight.quantize(random_weight(), scratch=Scratch())
    dense = frozen.dequantize(dtype=torch.float32)
    x, grad = torch.randn(2, 5, 40), torch.randn(2, 5, 24)
    assert torch.equal(frozen.matmul(x), x @ dense.T)
    assert torch.equal(frozen.matmul_transposed(grad), grad @ dense)
