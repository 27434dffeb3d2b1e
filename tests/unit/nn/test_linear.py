import pytest
import torch

from stoker.nn.linear import FusedLinear


def test_parts_lie_side_by_side():
    layer = FusedLinear(4, (3, 2), names=("a.q_proj", "a.k_proj"), bias=True)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 4)
    out = layer(x)
    assert layer.slices == (slice(0, 3), slice(3, 5))
    for rows in layer.slices:
        torch.testing.assert_close(out[..., rows], x @ layer.weight[rows].T + layer.bias[rows])
    assert "q_proj, k_proj" in repr(layer)


def test_every_part_needs_a_name():
    with pytest.raises(ValueError, match="2 parts but 1 names"):
        FusedLinear(4, (3, 2), names=("a.q_proj",))
