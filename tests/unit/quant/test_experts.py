"""Experts in NF4: each as if quantised alone, and made dense where rows are."""

import pytest
import torch

from stoker.kernels.triton_support import available
from stoker.quant.experts import NF4Experts
from stoker.quant.frozen import Scratch
from stoker.quant.nf4 import NF4Weight


@pytest.mark.parametrize(("out", "size"), [(128, 128), (6, 20)], ids=["whole blocks", "odd"])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_each_expert_is_quantised_as_if_alone(out, size, implementation):
    if implementation == "triton" and (not available() or torch.cuda.is_available()):
        pytest.skip("needs Triton's interpreter")
    weight = torch.randn(3, out, size, generator=torch.Generator().manual_seed(0))
    experts = NF4Experts.quantize(weight, parts=2, scratch=Scratch(), implementation=implementation)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    dense = experts.dense(ends, torch.float32)
    for expert in (0, 2):  # the one between has no rows
        halves = [NF4Weight.quantize(half).dequantize(dtype=torch.float32) for half in weight[expert].chunk(2)]
        assert torch.equal(dense[expert], torch.cat(halves))
    assert torch.equal(experts.dequantize(dtype=torch.float32)[0], dense[0])


def test_experts_without_rows_are_left_alone_by_the_kernel():
    if not available() or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    weight = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    experts = NF4Experts.quantize(weight, scratch=Scratch(), implementation="triton")
    buffer = experts.stored.scratch.take((3 * 128, 128), dtype=torch.float32, device=torch.device("cpu")).fill_(7.0)
    experts.dense(torch.tensor([0, 4, 4], dtype=torch.int32), torch.float32)
    assert (buffer[:128] == 7.0).all()
    assert (buffer[128:256] != 7.0).all()
    assert (buffer[256:] == 7.0).all()


def test_rows_of_unequal_experts_are_refused():
    with pytest.raises(ValueError, match="7 rows are not those of 2 equal experts"):
        NF4Experts(NF4Weight.quantize(torch.randn(7, 64)), 2)
