"""What the driver's management library answers, with a library that is made up."""

import ctypes
from ctypes import POINTER, c_int, c_uint, cast

import pytest

from stoker.compose import nvml


class Library:
    """NVML over a machine of such GPUs; `lacks`: functions that an old driver has not."""

    def __init__(self, *gpus, lacks=()):
        self.machine = gpus
        self.lacks = lacks
        self.is_open = False

    def __getattr__(self, name):
        answer = name.replace("nvml", "nvml_").lower()
        if name in self.lacks or answer not in type(self).__dict__:
            raise AttributeError(name)
        return getattr(self, answer)

    def nvml_init_v2(self):
        self.is_open = True
        return 0

    def nvml_shutdown(self):
        self.is_open = False
        return 0

    def nvml_devicegetcount_v2(self, count):
        count._obj.value = len(self.machine)
        return 0

    def nvml_devicegethandlebyindex_v2(self, index, handle):
        handle._obj.value = index.value + 1
        return 0

    def _at(self, handle):
        return self.machine[handle.value - 1]

    def nvml_devicegetname(self, handle, buffer, size):
        assert size.value == len(buffer)
        buffer.value = self._at(handle).name.encode()
        return 0

    def nvml_devicegetuuid(self, handle, buffer, size):
        buffer.value = self._at(handle).uuid.encode()
        return 0

    def nvml_devicegetmemoryinfo(self, handle, memory):
        # Three unsigned 64-bit numbers: total, free, used (nvmlMemory_t of nvml.h).
        numbers = cast(memory, POINTER(ctypes.c_uint64))
        gpu = self._at(handle)
        numbers[0], numbers[1], numbers[2] = gpu.total_bytes, gpu.free_bytes, gpu.total_bytes - gpu.free_bytes
        return 0

    def nvml_devicegetcudacomputecapability(self, handle, major, minor):
        cast(major, POINTER(c_int))[0], cast(minor, POINTER(c_int))[0] = self._at(handle).compute_capability
        return 0

    def nvml_devicegetmigmode(self, handle, current, pending):
        if self._at(handle).compute_capability < (8, 0):
            return 3  # not supported
        cast(current, POINTER(c_uint))[0] = cast(pending, POINTER(c_uint))[0] = self._at(handle).is_divided
        return 0


H200 = nvml.Gpu("NVIDIA H200", "GPU-aa11", 150_754_820_096, 150_000_000_000, (9, 0), is_divided=False)
HALF = H200._replace(uuid="GPU-ab22", is_divided=True)
T4 = nvml.Gpu("Tesla T4", "GPU-bb33", 16_106_127_360, 15_000_000_000, (7, 5), is_divided=False)


def answered(monkeypatch, library):
    monkeypatch.setattr(nvml, "_library", lambda: library)
    return nvml.gpus()


def test_every_gpu_is_told_as_it_is(monkeypatch):
    library = Library(H200, HALF, T4)
    assert answered(monkeypatch, library) == (H200, HALF, T4)
    assert not library.is_open


def test_a_driver_that_lacks_a_question_tells_of_none_and_is_left_closed(monkeypatch):
    library = Library(H200, lacks=("nvmlDeviceGetCudaComputeCapability",))
    assert answered(monkeypatch, library) == ()
    assert not library.is_open
    assert answered(monkeypatch, Library(T4, lacks=("nvmlDeviceGetMigMode",))) == (T4,)


def test_a_machine_without_a_driver_has_none(monkeypatch):
    def missing():
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(nvml, "_library", missing)
    assert nvml.gpus() == ()
    failing = Library(H200)
    failing.nvml_init_v2 = lambda: 9  # the driver is not loaded
    assert answered(monkeypatch, failing) == ()


def test_a_library_that_does_not_close_takes_nothing_back(monkeypatch):
    failing = Library(H200)
    failing.nvml_shutdown = lambda: 999  # unknown error
    assert answered(monkeypatch, failing) == (H200,)
    assert answered(monkeypatch, Library(H200, lacks=("nvmlShutdown", "nvmlDeviceGetName"))) == ()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (None, (H200, HALF, T4)),
        ("", ()),
        ("2,0", (T4, H200)),
        ("0,-1,2", (H200,)),
        ("7", ()),
        ("GPU-bb33", (T4,)),
        ("GPU-bb", (T4,)),
        ("GPU-a", ()),  # which of two
        ("MIG-0000", ()),
    ],
)
def test_what_is_visible_is_what_cuda_would_show(shown, expected):
    assert nvml.visible((H200, HALF, T4), shown) == expected
