"""Tensors that wait on the host come back as they were, and their buffers are used again."""

import pytest
import torch

from stoker.kernels.offload import MAX_LEAVING, HostOffload, is_dense


def test_tensors_come_back_with_their_values_shapes_and_strides(draw):
    offload = HostOffload(prefetch=2, min_bytes=20)
    tensors = [draw(4, 6).float(), draw(2, 3, 4).bfloat16().transpose(0, 2), draw(5).float()]
    copies = [tensor.clone() for tensor in tensors]
    handles = [offload.store(tensor) for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(7.0)  # the stored value is the one at the time of storing
    for handle, expected, original in reversed(list(zip(handles, copies, tensors, strict=True))):
        actual = offload.fetch(handle)
        assert torch.equal(actual, expected)
        assert (actual.stride(), actual.device) == (original.stride(), original.device)
        offload.release(handle)
    assert offload.num_stored == 0


def test_host_buffers_are_used_again(draw):
    offload = HostOffload()
    for _ in range(3):
        handles = [offload.store(draw(8, 8).float()) for _ in range(2)]
        for handle in reversed(handles):
            offload.fetch(handle)
            offload.release(handle)
    assert offload.host_bytes == 2 * 8 * 8 * 4


def test_clear_releases_everything(draw):
    offload = HostOffload()
    for _ in range(2):
        offload.store(draw(4).float())
    offload.clear()
    assert offload.num_stored == 0


class _Stream:
    """Takes note of what is waited for."""

    def __init__(self):
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event)


def test_copies_lag_by_what_layers_will_keep_that_have_not_run(monkeypatch):
    stream = _Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    offload = HostOffload(spare_bytes=2 * 800)

    def leave(*numbers):
        for number in numbers:
            offload._leaving.append((torch.empty(100), number))  # 400 bytes each
            offload._make_room(MAX_LEAVING)

    leave(*range(8))
    assert stream.waited == []  # the newest four, and 1,600 bytes before them
    leave(8)
    assert stream.waited == [0]
    offload.stay(800)
    assert stream.waited == [0, 1, 2]
    offload.stay(800)
    assert stream.waited == list(range(9))  # nothing is spare any more
    offload.clear()
    leave(*range(10, 18))
    assert stream.waited == list(range(9))


def test_without_spare_memory_all_but_the_newest_have_left(monkeypatch):
    stream = _Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    offload = HostOffload()
    for number in range(6):
        offload._leaving.append((torch.empty(100), number))
        offload._make_room(MAX_LEAVING)
    assert stream.waited == [0, 1]


def test_tensors_with_gaps_are_told_from_dense_ones(draw):
    x = draw(4, 6)
    assert is_dense(x)
    assert is_dense(x.T)
    assert is_dense(draw(1, 5, 1))
    assert not is_dense(x[:, ::2])
    assert not is_dense(x[:1].expand(4, 6))
    assert not HostOffload().takes(x)  # too small
    assert HostOffload(min_bytes=1).takes(x)
    with pytest.raises(ValueError, match="has gaps"):
        HostOffload().store(x[:, ::2])
