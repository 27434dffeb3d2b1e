"""What NVIDIA's driver tells of its GPUs through its management library (NVML), with no CUDA context and no PyTorch.

A context takes half a gigabyte of the GPU that it is made on, and PyTorch seconds to import: neither is for a process
that only looks, or that starts others. Reference: docs.nvidia.com/deploy/nvml-api.
"""

import contextlib
import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_TEXT_BYTES = 96


class Gpu(NamedTuple):
    """One GPU; `free_bytes`: of its memory now. `is_divided`: into instances (MIG), of which processes see one."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    is_divided: bool


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Unanswered(Exception):  # noqa: N818 - nothing is wrong: there is no driver, or one that lacks the question
    """NVML did not answer a question."""


def gpus() -> tuple[Gpu, ...]:
    """Returns the machine's GPUs in the order of their slots; none where there is no driver, or it does not answer."""
    try:
        library = opened()
    except Unanswered:
        return ()
    try:
        count = ctypes.c_uint()
        ask(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        return tuple(_gpu(library, index) for index in range(count.value))
    except Unanswered:
        return ()
    finally:
        with contextlib.suppress(Unanswered):  # what was answered before stands
            ask(library, "nvmlShutdown")


def opened() -> Any:
    """Returns the library, until "nvmlShutdown" is asked of it; raises Unanswered where there is none."""
    try:
        library = _library()
    except OSError as error:
        raise Unanswered(str(error)) from error
    ask(library, "nvmlInit_v2")
    return library


def ask(library: Any, question: str, *arguments: Any) -> None:
    """Calls a function of the library; raises Unanswered where it lacks it, or returns anything but success (0)."""
    function = getattr(library, question, None)
    code = None if function is None else function(*arguments)
    if code != 0:
        raise Unanswered(f"{question} is not there" if code is None else f"{question} failed with code {code}")


def visible(found: Sequence[Gpu], shown: str | None) -> tuple[Gpu, ...]:
    """Returns those of the GPUs that CUDA_VISIBLE_DEVICES (None: it is not set) shows, in its order.

    By number or by the beginning of a UUID; as for CUDA, the first that names none ends the list.
    """
    if shown is None:
        return tuple(found)
    chosen: list[Gpu] = []
    for name in (part.strip() for part in shown.split(",")):
        if name.isdigit():
            named = list(found[int(name) : int(name) + 1])
        else:
            named = [one for one in found if name and one.uuid.startswith(name)]
        if len(named) != 1:
            break
        chosen += named
    return tuple(chosen)


def _library() -> Any:
    return ctypes.CDLL(_LIBRARY)


def _gpu(library: Any, index: int) -> Gpu:
    handle, memory = ctypes.c_void_p(), _Memory()
    major, minor, divided = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint()
    ask(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    ask(library, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    ask(library, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    with contextlib.suppress(Unanswered):  # as by a GPU that cannot be divided
        ask(library, "nvmlDeviceGetMigMode", handle, ctypes.byref(divided), ctypes.byref(ctypes.c_uint()))
    return Gpu(
        _text(library, "nvmlDeviceGetName", handle),
        _text(library, "nvmlDeviceGetUUID", handle),
        memory.total,
        memory.free,
        (major.value, minor.value),
        bool(divided.value),
    )


def _text(library: Any, question: str, handle: ctypes.c_void_p) -> str:
    answer = ctypes.create_string_buffer(_TEXT_BYTES)
    ask(library, question, handle, answer, ctypes.c_uint(_TEXT_BYTES))
    return answer.value.decode()
