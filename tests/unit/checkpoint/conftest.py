import pytest
import torch


@pytest.fixture
def content():
    """Tensors and values of a small checkpoint; `fill` tells two of them apart."""

    def make(fill=1.0):
        tensors = {
            "weights": {"a.weight": torch.full((3, 5), fill), "a.bias": torch.full((5,), fill, dtype=torch.bfloat16)},
            "optimizer": {"step:a.weight": torch.tensor(fill), "codes": torch.arange(7, dtype=torch.uint8)},
        }
        return {"tensors": tensors, "values": {"fill": fill, "list": [1, 2.5, None]}}

    return make
