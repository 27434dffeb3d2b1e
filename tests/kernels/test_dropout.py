"""Dropout that makes its mask again from a seed."""

import pytest
import torch

from stoker.kernels.dropout import drop

BOTH = pytest.mark.parametrize("implementation", ["reference", "triton"])


@BOTH
@pytest.mark.parametrize(("rows", "columns"), [(64, 7), (16, 300), (4, 5000)])
def test_zeroes_its_share_and_scales_the_rest(implementation, rows, columns, device):
    x = torch.full((rows, columns), 3.0, device=device)
    y = drop(x, rate=0.25, seed=2**61 + 5, implementation=implementation)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 4.0))
    spread = (0.25 * 0.75 / x.numel()) ** 0.5
    assert abs(1 - kept.float().mean().item() - 0.25) < 5 * spread
    # Neither rows nor columns share their masks.
    assert len({tuple(row.tolist()) for row in kept}) > 1
    if columns > 100:
        assert abs((kept[0] == kept[1]).float().mean().item() - (0.75**2 + 0.25**2)) < 0.2
        assert (kept[:, : columns // 2] != kept[:, columns // 2 : 2 * (columns // 2)]).any()


@BOTH
def test_a_seed_gives_one_mask_for_any_values_and_dtype(implementation, device):
    x = torch.randn(5, 130, device=device)
    ones = torch.ones_like(x, dtype=torch.bfloat16)
    mask = drop(ones, rate=0.5, seed=11, implementation=implementation)
    assert torch.equal(mask, drop(ones, rate=0.5, seed=11, implementation=implementation))
    assert not torch.equal(mask, drop(ones, rate=0.5, seed=12, implementation=implementation))
    if implementation == "triton":
        torch.testing.assert_close(drop(x, rate=0.5, seed=11, implementation=implementation), x * mask.float())


@BOTH
def test_adds_to_what_is_there(implementation, device):
    x, total = torch.randn(4, 20, device=device), torch.randn(4, 20, device=device)
    expected = total + drop(x, rate=0.3, seed=1, implementation=implementation)
    assert drop(x, rate=0.3, seed=1, onto=total, implementation=implementation) is total
    torch.testing.assert_close(total, expected)


@BOTH
def test_rows_of_a_wider_tensor(implementation, device):
    wide = torch.randn(4, 40, device=device)
    expected = drop(wide[:, :20].contiguous(), rate=0.3, seed=1, implementation=implementation)
    assert torch.equal(drop(wide[:, :20], rate=0.3, seed=1, implementation=implementation), expected)


def test_pieces_have_the_mask_of_the_whole(device):
    x = torch.randn(9, 33, device=device)
    whole = drop(x, rate=0.4, seed=3, implementation="triton")
    pieces = [drop(x[i : i + 4], rate=0.4, seed=3, first_row=i, implementation="triton") for i in (0, 4, 8)]
    assert torch.equal(torch.cat(pieces), whole)


def test_a_rate_of_zero_copies_nothing(device):
    x = torch.randn(2, 3, device=device)
    assert drop(x, rate=0.0, seed=1, implementation="triton") is x


def test_refuses_a_rate_that_is_none(device):
    with pytest.raises(ValueError, match="rate = 1"):
        drop(torch.ones(1, 1, device=device), rate=1.0, seed=1)
