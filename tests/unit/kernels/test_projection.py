"""A layer's output that is added to the residual stream."""

import pytest
import torch

from stoker.kernels.projection import Projection, project_onto


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_added_to_the_residual_where_it_is_asked_to_be(dtype, has_bias):
    generator = torch.Generator().manual_seed(0)
    x, residual, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((6, 8), (6, 4), (4, 8), (4,))
    )
    before, whole = residual.clone(), torch.full((12, 4), 7.0, dtype=dtype)
    projection = Projection(weight, bias if has_bias else None)
    out = whole[3:9]
    assert project_onto(projection, x, residual, None, out=out) is out
    expected = residual.double() + x.double() @ weight.double().t() + (bias.double() if has_bias else 0.0)
    # bf16 has 8 significant bits; the sum is rounded once, or three times with a bias.
    torch.testing.assert_close(out.double(), expected, rtol=1e-5 if dtype == torch.float32 else 3 / 256, atol=1e-2)
    assert torch.equal(project_onto(projection, x, residual, None), out)
    assert torch.equal(residual, before)
    assert (whole[:3] == 7).all() and (whole[9:] == 7).all()


def test_a_plain_product_and_its_sum_are_rounded_once():
    # 257 is no number in bf16: rounded by itself the product would be 256, and the sum 0.
    x, weight = torch.tensor([[1.0, 1.0]]).bfloat16(), torch.tensor([[256.0, 1.0]]).bfloat16()
    residual = torch.tensor([[-256.0]]).bfloat16()
    assert project_onto(Projection(weight), x, residual, None).item() == 1.0
