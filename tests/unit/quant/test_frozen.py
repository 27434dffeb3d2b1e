import pytest
import torch

from stoker.quant.formats import FORMATS, quantize
from stoker.quant.frozen import FrozenWeight, Scratch, frozen_linear


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_offers_the_same_interface(kind):
    frozen = quantize(random(48, 64), kind, part_rows=(32, 16), scratch=Scratch())
    assert isinstance(frozen, FrozenWeight)
    assert frozen.shape == (48, 64)
    assert not list(frozen.parameters())
    assert frozen.dequantize(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert frozen.matmul(random(3, 64)).shape == (3, 48)
    assert frozen.matmul_transposed(random(2, 3, 48)).shape == (2, 3, 64)


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="'int3'; allowed: nf4, int8, fp8"):
        quantize(random(4, 4), "int3")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_of_a_frozen_linear_are_those_of_the_dequantised_one(kind):
    frozen = quantize(random(48, 64), kind)
    dense = frozen.dequantize(dtype=torch.float32)
    x, bias = random(2, 5, 64, seed=1).requires_grad_(), random(48, seed=2).requires_grad_()
    grad = random(2, 5, 48, seed=3)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), grad)
    actual = torch.autograd.grad(frozen_linear(x, frozen, bias=bias), (x, bias), grad)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # order of float32 sums over 10 rows


def test_a_frozen_linear_saves_no_dequantised_weight():
    saved = []
    frozen = quantize(random(48, 64), "nf4")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(random(5, 64).requires_grad_(), frozen)
    assert saved == []


def test_scratch_grows_and_is_shared():
    scratch = Scratch()
    small = scratch.take((4, 8), dtype=torch.float32, device=torch.device("cpu"))
    large = scratch.take((8, 8), dtype=torch.float32, device=torch.device("cpu"))
    again = scratch.take((4, 8), dtype=torch.float32, device=torch.device("cpu"))
    assert (small.shape, large.shape) == ((4, 8), (8, 8))
    assert again.data_ptr() == large.data_ptr()
    assert scratch.num_bytes == 8 * 8 * 4
