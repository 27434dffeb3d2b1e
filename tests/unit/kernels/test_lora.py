"""lora_linear against its plain reference: outputs, gradients, dropout, checkpointing, autocast; DoRA's parts."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stoker.kernels.dora import row_norms, scale_columns
from stoker.kernels.lora import lora_linear, lora_linear_reference

CASES = {
    "one part": (7, 5, (slice(0, 6),), 6, 2),
    "all parts": (4, 8, (slice(0, 6), slice(6, 9), slice(9, 12)), 12, 3),
    "first and last": (5, 8, (slice(0, 6), slice(9, 12)), 12, 2),
    "one row, rank one": (1, 3, (slice(2, 4),), 4, 1),
    "no rows": (0, 3, (slice(0, 4),), 4, 2),
    "rank above width": (3, 2, (slice(0, 4),), 4, 5),
}


def make(case, *, dtype=torch.float64, bias=True):
    num_rows, in_features, slices, out_features, rank = CASES[case]
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)

    tensors = (
        draw(num_rows, in_features),
        draw(out_features, in_features),
        draw(out_features) if bias else None,
        draw(len(slices) * rank, in_features),
        draw(sum(rows.stop - rows.start for rows in slices), rank),
    )
    return tensors, {"scaling": 1.7, "slices": slices}


def gradients(output, tensors):
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_equal_the_reference(case, bias):
    tensors, options = make(case, bias=bias)
    ours, reference = lora_linear(*tensors, **options), lora_linear_reference(*tensors, **options)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(ours, tensors), gradients(reference, tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["all parts", "first and last"])
def test_gradients_equal_finite_differences(case):
    tensors, options = make(case)
    assert torch.autograd.gradcheck(lambda *inputs: lora_linear(*inputs, **options), tensors)


def test_gradients_with_dropout_equal_finite_differences():
    tensors, options = make("all parts")

    def dropped(*inputs):
        torch.manual_seed(11)
        return lora_linear(*inputs, dropout=0.4, training=True, **options)

    assert torch.autograd.gradcheck(dropped, tensors)
    assert not torch.equal(dropped(*tensors), lora_linear(*tensors, **options))


def test_leading_dimensions_and_strides_of_the_input_do_not_matter():
    (x, weight, bias, a, b), options = make("all parts")
    wide = torch.stack([x, x.flip(0)]).transpose(0, 1).detach().requires_grad_()
    ours = lora_linear(wide, weight, bias, a, b, **options)
    reference = lora_linear_reference(wide, weight, bias, a, b, **options)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    expanded = torch.ones((), dtype=ours.dtype).expand_as(ours)
    for mine, theirs in zip(
        torch.autograd.grad(ours, [wide, a, b], expanded),
        torch.autograd.grad(reference, [wide, a, b], expanded),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_frozen_base_gets_no_gradient_and_a_frozen_input_costs_none():
    (x, weight, _, a, b), options = make("all parts")
    x, weight = x.detach(), weight.detach()
    output = lora_linear(x, weight, None, a, b, **options)
    output.sum().backward()
    assert weight.grad is None
    assert x.grad is None
    assert a.grad is not None
    assert b.grad is not None


def test_only_the_input_and_the_small_product_are_kept():
    (x, weight, bias, a, b), options = make("all parts")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(x, weight, bias, a, b, dropout=0.5, training=True, **options)
    parameters = {tensor.data_ptr() for tensor in (weight, bias, a, b)}
    activations = [tensor for tensor in kept if tensor.data_ptr() not in parameters]
    assert sum(tensor.numel() for tensor in activations) == x.numel() + x.shape[0] * a.shape[0]


def test_dropout_is_repeatable_unbiased_and_off_outside_training():
    (x, weight, bias, a, b), options = make("all parts", dtype=torch.float32)
    torch.manual_seed(5)
    first = lora_linear(x, weight, bias, a, b, dropout=0.5, training=True, **options)
    second = lora_linear(x, weight, bias, a, b, dropout=0.5, training=True, **options)
    torch.manual_seed(5)
    again = lora_linear(x, weight, bias, a, b, dropout=0.5, training=True, **options)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    plain = lora_linear(x, weight, bias, a, b, **options)
    assert torch.equal(lora_linear(x, weight, bias, a, b, dropout=0.5, training=False, **options), plain)
    ones, eye = torch.ones(2000, 1), torch.ones(1, 1)
    outputs = lora_linear(
        ones, 0 * eye, None, eye, eye, scaling=1.0, slices=(slice(0, 1),), dropout=0.25, training=True
    )
    assert outputs.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert outputs.mean().item() == pytest.approx(1.0, abs=0.06)  # standard deviation 0.013, and the seed is fixed


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_with_dropout_gives_the_same_gradients(use_reentrant):
    tensors, options = make("all parts")

    def run(*inputs):
        return lora_linear(*inputs, dropout=0.3, training=True, **options)

    torch.manual_seed(7)
    plain = gradients(run(*tensors), tensors)
    torch.manual_seed(7)
    output = checkpoint(run, *tensors, use_reentrant=use_reentrant)
    if use_reentrant:  # torch.autograd.grad is not allowed there
        (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        recomputed = [tensor.grad for tensor in tensors]
    else:
        recomputed = gradients(output, tensors)
    for mine, theirs in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_under_autocast_computes_in_bf16_and_returns_fp32_gradients():
    (x, weight, bias, a, b), options = make("all parts", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = lora_linear(x, weight.bfloat16().detach(), bias, a, b, **options)
    assert output.dtype == torch.bfloat16
    reference = lora_linear_reference(x, weight, bias, a, b, **options)
    # bf16 keeps 8 bits: 2^-8 of the largest terms, and a handful of them are summed.
    torch.testing.assert_close(output.float(), reference, rtol=0.02, atol=0.02 * reference.abs().max().item())
    for mine, theirs in zip(gradients(output, (x, a, b)), gradients(reference, (x, a, b)), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_backward_inside_autocast_equals_backward_outside():
    (x, weight, _, a, b), options = make("all parts", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(lora_linear(x, weight.detach(), None, a, b, **options), (x, a, b))
        output = lora_linear(x, weight.detach(), None, a, b, **options)
    for mine, theirs in zip(inside, gradients(output, (x, a, b)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norms_equal_those_of_the_formed_matrix(dtype, monkeypatch):
    monkeypatch.setattr("stoker.kernels.dora._CHUNK_BYTES", 100)  # several chunks a part
    (_, weight, _, a, b), options = make("first and last", dtype=torch.float32)
    weight = weight.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        norms = row_norms(weight, a, b, **options)
    rank = b.shape[1]
    formed = [
        weight[rows].float() + options["scaling"] * b_part @ a_part
        for rows, a_part, b_part in zip(options["slices"], a.split(rank), b.split([6, 3]), strict=True)
    ]
    torch.testing.assert_close(norms, torch.cat(formed).norm(dim=1), rtol=1e-5, atol=1e-5)
    assert not norms.requires_grad


def test_scale_columns_has_the_gradients_of_a_product():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(scale_columns(x, scale), x * scale)
    assert torch.autograd.gradcheck(scale_columns, (x, scale))


def test_scale_columns_multiplies_bf16_by_the_unrounded_scale():
    x = torch.linspace(0.5, 2.0, 4096).bfloat16()[:, None].requires_grad_()
    scale = torch.tensor([1.003], requires_grad=True)  # rounds to 1 in bf16
    output = scale_columns(x, scale)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, (x.double() * scale.double()).bfloat16())
    assert not torch.equal(output, x)
    output.sum().backward()
    assert scale.grad.item() == pytest.approx(x.float().sum().item(), rel=1e-3)
    assert x.grad.dtype == torch.bfloat16
