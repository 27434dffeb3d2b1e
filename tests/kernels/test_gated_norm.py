"""Mamba-2's gated norm."""

import inspect

import pytest
import torch

from stoker.kernels.gated_norm import gated_rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5


def norm(implementation, **options):
    return lambda y, z, weight: gated_rms_norm(y, z, weight, EPSILON, implementation=implementation, **options)


@pytest.mark.parametrize("name", ["mamba2.modeling_mamba2.MambaRMSNormGated", "bamba.modeling_bamba.BambaRMSNormGated"])
def test_reference_equals_transformers(name, draw):
    module, cls = name.rsplit(".", 1)
    made = getattr(pytest.importorskip(f"transformers.models.{module}"), cls)
    if "group_size" not in inspect.signature(made).parameters:
        pytest.skip("these Transformers know no groups")
    theirs = made(12, 4, EPSILON).to(draw(1).device)
    y, z = draw(2, 5, 12).float(), draw(2, 5, 12).float()
    torch.testing.assert_close(norm("reference", groups=3)(y, z, theirs.weight), theirs(y, z))


@pytest.mark.parametrize("first", [True, False])
def test_reference_equals_transformers_either_way(first, draw):
    falcon = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
    theirs = falcon.FalconH1RMSNormGated(12, EPSILON, 3, norm_before_gate=not first).to(draw(1).device)
    y, z = draw(2, 5, 12).float(), draw(2, 5, 12).float()
    torch.testing.assert_close(norm("reference", groups=3, gate_first=first)(y, z, theirs.weight), theirs(y, z))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "first"), [(1, True), (3, True), (3, False)])
def test_kernel_is_as_exact_as_eager(groups, first, dtype, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        norm("triton", groups=groups, gate_first=first),
        norm("reference", groups=groups, gate_first=first),
        [draw(2, 3, 33), draw(2, 3, 33), draw(33)],
        dtype=dtype,
        factor=4,
    )


def test_a_frozen_weight_changes_nothing_else_and_views_are_read_by_their_strides(draw):
    joined = draw(2, 3, 20).float().requires_grad_()
    weight, results = draw(8).float(), []
    for implementation in ("reference", "triton"):
        y, _, z = joined.split((8, 4, 8), dim=-1)
        out = norm(implementation)(y, z, weight)
        # A sum's gradient is one number expanded, its strides zero.
        results.append((out, *torch.autograd.grad(out.sum(), joined)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_no_rows_give_no_rows_and_a_zero_weight_gradient(draw):
    y, weight = draw(0, 16).float(), draw(16).float().requires_grad_()
    out = norm("triton")(y, y, weight)
    assert out.shape == (0, 16)
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], torch.zeros_like(weight))


def test_channels_that_do_not_split_are_refused(draw):
    with pytest.raises(ValueError, match="10 channels do not split into 3 groups"):
        norm("reference", groups=3)(draw(1, 10), draw(1, 10), draw(10))
