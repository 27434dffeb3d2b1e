"""Lengths of rows and factors of outputs: Triton's kernels against the formulas in float64, and what they spare."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.kernels import dora, glu, scaled_glu
from stoker.kernels.dora import row_norms, scale_columns, scaled, scaled_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(dtype):
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "columns", "rank"), [((70, 16), 200, 3), ((5,), 33, 40)])
def test_lengths_are_those_of_the_formed_matrix_in_every_dtype(dtype, sizes, columns, rank, draw):
    starts = [
        7 + sum(sizes[:index]) for index in range(len(sizes))
    ]  # of a part without an adapter come seven rows first
    slices = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    weight = draw(7 + sum(sizes), columns).to(dtype)
    a, b = draw(len(sizes) * rank, columns).float(), draw(sum(sizes), rank).float()
    options = {"scaling": 0.3, "slices": slices}
    formed = torch.cat(
        [
            weight[rows].double() + 0.3 * b_part.double() @ a_part.double()
            for rows, a_part, b_part in zip(slices, a.split(rank), b.split(sizes), strict=True)
        ]
    ).norm(dim=1)
    made = row_norms(weight, a, b, **options, implementation="triton")
    # A in two bf16 values has 16 bits: far nearer to the truth than bf16 itself, in which the layer uses A.
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 3e-5}[dtype]
    torch.testing.assert_close(made.double(), formed, rtol=tolerance, atol=0)
    reference = row_norms(weight, a, b, **options)
    torch.testing.assert_close(reference.double(), formed, rtol=1e-6, atol=0)


def test_lengths_of_rows_that_an_update_all_but_cancels_are_no_less_exact_than_the_references(draw):
    a, b = draw(16, 64).float(), draw(20, 16).float()
    weight = (-(b @ a) + 1e-3 * draw(20, 64).float()).to(torch.float32)
    truth = (weight.double() + b.double() @ a.double()).norm(dim=1)
    errors = [
        (row_norms(weight, a, b, scaling=1.0, slices=[slice(0, 20)], implementation=name).double() - truth).abs().max()
        for name in ("reference", "triton")
    ]
    assert errors[1] <= 4 * errors[0] + 1e-6
    assert not torch.isnan(torch.stack(errors)).any()


def test_ranks_above_the_kernels_have_the_references_lengths(draw):
    rank = dora.MAX_RANK + 1
    weight, a, b = draw(4, 8).float(), draw(rank, 8).float(), draw(4, rank).float()
    options = {"scaling": 1.0, "slices": [slice(0, 4)]}
    assert torch.equal(row_norms(weight, a, b, **options, implementation="triton"), row_norms(weight, a, b, **options))
    with pytest.raises(ValueError, match="other"):
        row_norms(weight, a, b, **options, implementation="other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("extra", [(), ("bias",), ("residual",), ("bias", "residual")])
def test_a_factor_bias_and_residual_are_one_pass_over_the_rows(dtype, implementation, extra, draw):
    x, scale = draw(3, 1100).to(dtype), 1 + 0.1 * draw(1100).float()
    more = {"bias": draw(1100).to(dtype), "residual": draw(3, 1100).to(dtype)}
    more = {name: value for name, value in more.items() if name in extra}
    expected = x.double() * scale.double() + sum(value.double() for value in more.values())
    out = x.clone()
    made = scaled(out, scale, **more, out=out, implementation=implementation)
    assert made is out
    torch.testing.assert_close(made.double(), expected, rtol=2 * bits(dtype), atol=6 * bits(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["new", "grad", "other", "nowhere"])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_factors_gradient_is_summed_where_that_of_its_rows_is_made(dtype, where, implementation, draw):
    rows, columns = dora.PROGRAM_ROWS + 3, 130  # two programs' rows, two blocks of columns
    grad, other, scale = draw(rows, columns).to(dtype), draw(rows, columns).to(dtype), draw(columns).float()
    truth, expected = (grad.double() * other.double()).sum(0), grad.double() * scale.double()
    out = {"new": torch.empty_like(grad), "grad": grad, "other": other, "nowhere": None}[where]
    total = scaled_backward(grad, other, scale, out=out, implementation=implementation)
    # The reference rounds each product.
    tolerance = 1e-5 if implementation == "triton" or dtype == torch.float32 else 0.02
    torch.testing.assert_close(total.double(), truth, rtol=tolerance, atol=tolerance * rows**0.5)
    if out is not None:
        torch.testing.assert_close(out.double(), expected, rtol=bits(dtype), atol=bits(dtype))


@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_gate_of_scaled_rows_has_autograds_result_and_gradients(activation, with_bias, implementation, draw):
    rows, inner = 19, 70
    z, grad = draw(rows, 2 * inner).float(), draw(rows, inner).float()
    scale, bias = 1 + 0.3 * draw(2 * inner).float(), draw(2 * inner).float() if with_bias else None
    leaves = [z.double().requires_grad_(), scale.double().requires_grad_()]
    y = leaves[0] * leaves[1] + (0 if bias is None else bias.double())
    expected = glu.gated_reference(y, activation)
    truths = torch.autograd.grad(expected, leaves, grad.double())
    options = {"activation": activation, "implementation": implementation}
    made = scaled_glu.gated_scaled(z, scale, bias, **options)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)
    grad_z, activated, grad_scale = scaled_glu.gated_scaled_backward(z, grad, scale, bias, **options)
    assert grad_z is z
    torch.testing.assert_close(activated.double(), expected, rtol=1e-5, atol=1e-5)
    for result, truth in zip((grad_z, grad_scale), truths, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=1e-4)


def test_columns_are_scaled_with_both_gradients_in_bf16(draw):
    x, grad = draw(5, 12).bfloat16().requires_grad_(), draw(5, 12).bfloat16()
    scale = (1 + 0.1 * draw(12).float()).requires_grad_()
    results = []
    for implementation in ("reference", "triton"):
        y = scale_columns(x, scale, implementation=implementation)
        results.append([y, *torch.autograd.grad(y, (x, scale), grad)])
    for reference, made in zip(*results, strict=True):
        assert made.dtype == reference.dtype
        torch.testing.assert_close(made.float(), reference.float(), rtol=0.02, atol=0.02)


class Traffic(TorchDispatchMode):
    """Bytes that PyTorch's own operations make or fill, on a CPU: new tensors, and those that are written again."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.bytes += result.numel() * result.element_size()
        return result


def test_triton_takes_lengths_without_a_copy_of_the_weight(draw):
    """The kernel reads all of it once, and there is but the result; the reference widens and squares it."""
    weight, a, b = draw(64, 96).bfloat16(), draw(8, 96).float(), draw(64, 8).float()
    made, launches = {}, []

    class Kernel:
        def __getitem__(self, grid):
            return lambda weight, *others, **constants: launches.append(weight.numel())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "_lengths_kernel", Kernel())  # the interpreter's own copies are none of a GPU's
        for implementation in ("reference", "triton"):
            with Traffic() as traffic:
                row_norms(weight, a, b, scaling=1.0, slices=[slice(0, 64)], implementation=implementation)
            made[implementation] = traffic.bytes
    assert launches == [weight.numel()]
    assert made["reference"] > 2 * 4 * weight.numel()
    assert made["triton"] <= 2 * 4 * 64
