"""Low-rank products of a backward in one read, and updates that are added on the way."""

import itertools

import pytest
import torch

from stoker.kernels import low_rank
from stoker.kernels.low_rank import (
    ROWS_A_PROGRAM,
    add_update,
    grad_pair,
    grad_pair_reference,
    scale_columns,
    sum_shares,
    takes,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def slices_of(sizes):
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "sizes", "rank"), [(70, (64, 16, 32), 3), (5, (150,), 16), (66, (32, 32), 20)])
def test_both_products_are_as_exact_as_eager(rows, sizes, rank, dtype, draw, assert_as_exact_as_eager):
    options = {"slices": slices_of(sizes), "scaling": 0.7}
    inputs = [draw(rows, sum(sizes)), draw(rows, rank * len(sizes)), draw(sum(sizes), rank)]
    assert takes(inputs[0], inputs[2], options["slices"])

    def kernel(*tensors):
        grad_p, grad_b = grad_pair(*tensors, **options, implementation="triton")
        assert grad_b.dtype is torch.float32
        return grad_p, grad_b.to(dtype)

    assert_as_exact_as_eager(
        kernel, lambda *tensors: grad_pair_reference(*tensors, **options), inputs, dtype=dtype, gradients=False
    )


def test_more_rows_than_a_program_takes_are_summed_and_strides_are_followed(draw):
    rows = ROWS_A_PROGRAM + 9
    grad, product, b = draw(rows, 40).float()[:, 4:36], draw(rows, 2).float(), draw(32, 2).float()
    options = {"slices": [slice(0, 32)], "scaling": 1.0}
    expected = grad_pair_reference(grad, product, b, **options)
    actual = grad_pair(grad, product, b, **options, implementation="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)  # float32 sums of 521 products, reordered
    again = grad_pair(grad, product, b, **options, implementation="triton")
    assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True))


@pytest.mark.parametrize(("many", "rows_a_program"), [(1, 128), (100, 64)])
def test_a_program_takes_twice_the_rows_where_programs_are_many(many, rows_a_program, draw, monkeypatch):
    monkeypatch.setattr(low_rank, "ROWS_A_PROGRAM", 64)
    monkeypatch.setattr(low_rank, "MANY_PROGRAMS", many)
    shares, plain = [], low_rank.sum_shares

    def summed(share_p, share_b, *args, **options):
        shares.append(share_b)
        return plain(share_p, share_b, *args, **options)

    monkeypatch.setattr(low_rank, "sum_shares", summed)
    grad, product, b = draw(200, 32).float(), draw(200, 2).float(), draw(32, 2).float()
    options = {"slices": [slice(0, 32)], "scaling": 1.0}
    actual = grad_pair(grad, product, b, **options, implementation="triton")
    expected = grad_pair_reference(grad, product, b, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 sums, reordered
    first = grad[:rows_a_program].t() @ product[:rows_a_program]
    torch.testing.assert_close(shares[0][0], first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "slices", [[slice(0, 8)], [slice(0, 5), slice(5, 32)], slices_of((8, 8, 8, 8)), [slice(16, 32), slice(0, 16)]]
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(slices, draw):
    grad, product = draw(4, 32).float(), draw(4, 2 * len(slices)).float()
    b = draw(sum(part.stop - part.start for part in slices), 2).float()
    assert not takes(grad, b, slices)
    actual = grad_pair(grad, product, b, slices=slices, scaling=2.0, implementation="triton")
    expected = grad_pair_reference(grad, product, b, slices=slices, scaling=2.0)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(70, 150, 3), (2, 16, 32)])
def test_update_and_residual_are_added_as_exactly_as_eager(rows, columns, rank, dtype, draw, assert_as_exact_as_eager):
    assert_as_exact_as_eager(
        lambda *tensors: add_update(*tensors, scaling=0.3, implementation="triton"),
        lambda *tensors: add_update(*tensors, scaling=0.3),
        [draw(rows, columns), draw(rows, columns), draw(rows, rank), draw(columns, rank)],
        dtype=dtype,
        gradients=False,
    )


@pytest.mark.parametrize(("ends", "num_rows", "num_columns"), [([3], 6, 9), ([1, 71], 60, 7), ([4, 5, 41], 7, 60)])
def test_shares_are_summed_by_runs(ends, num_rows, num_columns, draw):
    # Neither rows nor columns fill their last program, nor shares the last turn of its loop.
    share_p, share_b = draw(ends[-1], num_rows, 5).float(), draw(19, num_columns, 5).float()
    grad_p, grad_b = sum_shares(share_p, share_b, ends, scaling=0.5)
    runs = [share_p[low:high].sum(0) for low, high in itertools.pairwise([0, *ends])]
    torch.testing.assert_close(grad_p, 0.5 * torch.cat(runs, dim=1))
    torch.testing.assert_close(grad_b, 0.5 * share_b.sum(0))


def test_unknown_implementation_is_refused(draw):
    with pytest.raises(ValueError, match="no implementation 'other'"):
        grad_pair(draw(2, 16), draw(2, 2), draw(16, 2), slices=[slice(0, 16)], scaling=1.0, implementation="other")


def test_update_and_residual_without_another_term_are_a_new_tensor(draw):
    residual, product, b = draw(5, 20).float(), draw(5, 2).float(), draw(20, 2).float()
    before = residual.clone()
    expected = residual + 0.3 * product @ b.T
    for implementation in ("reference", "triton"):
        actual = add_update(None, residual, product, b, scaling=0.3, implementation=implementation)
        torch.testing.assert_close(actual, expected)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(("rows", "sizes", "rank"), [(70, (64, 16, 32), 3), (5, (150,), 16)])
def test_the_first_product_comes_times_a_factor_of_each_row_too(rows, sizes, rank, implementation, draw, device):
    grad, product, b = (
        draw(rows, sum(sizes)).float(),
        draw(rows, rank * len(sizes)).float(),
        draw(sum(sizes), rank).float(),
    )
    factor, room = torch.rand(rows, device=device) + 0.5, torch.empty_like(product)
    options = {"slices": slices_of(sizes), "scaling": 0.7, "implementation": implementation}
    plain = grad_pair(grad, product, b, **options)
    made = grad_pair(grad, product, b, factored=(factor, room), **options)
    assert all(torch.equal(x, y) for x, y in zip(made, plain, strict=True))
    torch.testing.assert_close(room, plain[0] * factor[:, None])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(3, 5), (7, low_rank.SCALED_COLUMNS + 8), (0, 4)])
def test_columns_are_scaled_in_fp32(shape, implementation, draw, device):
    x, factor = draw(*shape).bfloat16(), draw(shape[1]).bfloat16()
    made = scale_columns(x, factor, implementation=implementation)
    assert made.dtype is torch.float32
    torch.testing.assert_close(made, x.float() * factor.float(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="implementation"):
        scale_columns(x, factor, implementation="other")
