import torch

from stoker.nn.norm import RmsNorm


def test_norm_has_unit_mean_square_times_its_weight():
    norm = RmsNorm(8, epsilon=0.0)
    out = norm(torch.randn(3, 8) * 7)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(3))
    with torch.no_grad():
        norm.weight.fill_(2.0)
    torch.testing.assert_close(norm(torch.ones(1, 8)), torch.full((1, 8), 2.0))


def test_add_returns_the_norm_of_the_sum_and_the_sum():
    norm = RmsNorm(8, epsilon=1e-6)
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    normed, total = norm.add(x, residual)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, norm(total))
