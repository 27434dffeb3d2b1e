"""Soft-capped scores and sinks on a GPU, where FlexAttention compiles them; `tests/unit/kernels` has the reference."""

import pytest
import torch

from stoker.kernels.attention import attention, attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernel needs a CUDA GPU")


# Rows of whole blocks of 128 and of a part of one more.
@pytest.mark.parametrize(
    ("length", "documents"), [(640, None), (640, ((300, 5, 335), (640,))), (200, ((60, 140), (200,)))]
)
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"softcap": 2.0, "window": 200}, {"window": 40}])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_compiled_kernel_equals_the_formula(length, documents, options, with_sinks):
    torch.manual_seed(0)
    if not (with_sinks or "softcap" in options):
        pytest.skip("plain scores do not take this way")
    shapes = [(2, length, 4, 64), (2, length, 2, 64), (2, length, 2, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda", requires_grad=True) if with_sinks else None
    wanted = [*inputs, sinks] if with_sinks else inputs
    exact = [x.detach().double().requires_grad_() for x in wanted]
    output = attention(*inputs, document_lengths=documents, scale=0.1, sinks=sinks, implementation="triton", **options)
    expected = attention_reference(
        *exact[:3], document_lengths=documents, scale=0.1, sinks=exact[3] if with_sinks else None, **options
    )
    grad = torch.randn_like(output)
    found = [output, *torch.autograd.grad(output, wanted, grad)]
    right = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for one, other in zip(found, right, strict=True):
        # bf16 keeps 8 bits of each factor.
        assert (one.double() - other).norm() <= 2e-2 * other.norm()
