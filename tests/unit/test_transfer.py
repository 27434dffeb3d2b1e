import pytest
import torch

from stoker import transfer


@pytest.mark.parametrize("values", [[], [0, 3, 2**31 - 1]])
def test_numbers_arrive_as_they_are(values):
    made = transfer.int32s(values, torch.device("cpu"))
    assert made.dtype == torch.int32
    assert made.tolist() == values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_host_does_not_wait_for_the_gpu():
    device = torch.device("cuda")
    transfer.int32s([1, 2], device)  # which allocates the pinned memory
    torch.cuda._sleep(10**9)
    done = torch.cuda.Event()
    done.record()
    made = transfer.int32s([1, 2], device)
    assert not done.query()
    assert made.tolist() == [1, 2]
