"""Compiling kernels side by side before the first step that needs them.

Triton compiles a kernel when it is first launched, one after the other: some thirty kernels in some ten seconds, on one
core. A rehearsal runs a step in which a launch only asks for its kernel, which threads compile (most of the compiler
runs without Python's lock), while libraries of matrix products and attention choose and load what they need. What a
kernel would have written is left as it was, so that all results of a rehearsal are meaningless.

Before 3.7 Triton also has the C compiler build what launches a kernel, a quarter of a second each, one after the other
at first launches: the same threads build those, into Triton's cache on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stoker.kernels.triton_support import KERNELS, triton

try:
    from triton.runtime import _async_compile as _triton_async_compile
except ImportError:  # before 3.5, or no Triton
    _triton_async_compile = None

asynchronous: Any = _triton_async_compile
"""Triton's compiling in threads; None without it."""

MAX_THREADS = 16


@dataclass
class Asked:
    """What was asked for while kernels were compiled ahead."""

    num_kernels: int = 0
    """Set on leaving: kernels that this process did not have yet, whether compiled or read from the cache on disk."""
    num_threads: int = 0


@dataclass
class _State:
    is_active: bool = False


_state = _State()


def is_compiling_ahead() -> bool:
    """Whether launches only ask for their kernels now, in whichever thread: what depends on a result must not run."""
    return _state.is_active


def can_compile_ahead() -> bool:
    """Whether kernels can be compiled side by side: they are compiled at all, by a Triton that knows how."""
    return asynchronous is not None and any(hasattr(kernel, "device_caches") for kernel in KERNELS)


@contextmanager
def compiling_ahead() -> Iterator[Asked]:
    """Within it a launch of a kernel, from any thread, only has it compiled; on leaving all of them are.

    Triton compiles a kernel anew for integers that are 1, or multiples of 16: `Batch.shortened` keeps those. Kernels
    whose sizes depend on the number of tokens in other ways are `jit_unspecialized` in them.

    Raises what the compiler raises.
    """
    kernels = [kernel for kernel in KERNELS if hasattr(kernel, "device_caches")]
    # Entered here, the mode's mark is this thread's alone, but autograd launches from threads of its own.
    asked = Asked(num_threads=min(MAX_THREADS, os.cpu_count() or 1))
    with ThreadPoolExecutor(asked.num_threads) as pool, asynchronous.AsyncCompileMode(_Compilers(pool)) as mode:
        try:
            _state.is_active = True
            for kernel in kernels:
                kernel.run = _asking(kernel.run, mode)
            yield asked
        finally:
            _state.is_active = False
            asked.num_kernels = len(mode.future_kernels)
            for kernel in kernels:
                del kernel.run  # that of the instance, which hides its class's


class _Compilers:
    """What Triton hands its compilations to: threads, which then have built what launches the kernel."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        """Returns the kernel that will be there."""
        return self._pool.submit(_with_launcher, compile_kernel)


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    # Its first launch makes it again, from the cache: loading needs the device, which this thread does not know.
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _asking(run: Callable[..., Any], mode: Any) -> Callable[..., Any]:
    """Returns a `run` that asks `mode` for the kernel instead of launching it."""

    def ask(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        token = asynchronous.active_mode.set(mode)
        try:
            return run(*args, grid=grid, warmup=True, **options)
        finally:
            asynchronous.active_mode.reset(token)

    return ask
