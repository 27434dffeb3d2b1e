"""Page-locked host memory: what it holds, and that it is locked and unlocked once."""

import gc
from types import SimpleNamespace

import pytest
import torch

from stoker.kernels import pinned


@pytest.fixture
def driver(monkeypatch):
    """The driver's two calls, written down instead of made."""
    calls = SimpleNamespace(locked=[], unlocked=[], code=0)

    def lock(address, num_bytes, flags):
        calls.locked.append((address, num_bytes))
        return calls.code

    runtime = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=calls.unlocked.append)
    monkeypatch.setattr(pinned.torch.cuda, "cudart", lambda: runtime)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_memory_is_locked_in_its_exact_size(driver, dtype):
    buffer = pinned.empty_pinned(3_000_001, dtype)
    assert (buffer.shape, buffer.dtype) == ((3_000_001,), dtype)
    assert driver.locked == [(buffer.data_ptr(), 3_000_001 * dtype.itemsize)]
    buffer.copy_(torch.arange(3_000_001) % 100)
    assert buffer[-1] == 3_000_000 % 100


def test_memory_is_unlocked_when_the_last_view_of_it_is_gone(driver):
    buffer = pinned.empty_pinned(5000, torch.float32)
    address, view = buffer.data_ptr(), buffer[10:]
    del buffer
    gc.collect()
    assert driver.unlocked == []
    del view
    gc.collect()
    assert driver.unlocked == [address]


def test_memory_that_cannot_be_locked_says_what_to_look_at(driver):
    driver.code = 2
    with pytest.raises(MemoryError, match="ulimit -l"):
        pinned.empty_pinned(5000, torch.float32)
    gc.collect()
    assert driver.unlocked == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_copies_to_and_from_it():
    buffer = pinned.empty_pinned(1_000_000, torch.float32)
    assert buffer.is_pinned()
    source = torch.randn(1_000_000, device="cuda")
    buffer.copy_(source, non_blocking=True)
    back = buffer.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(back, source)
