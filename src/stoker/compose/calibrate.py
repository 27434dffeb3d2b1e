"""Measures what a plan wants to know of this machine: products, copies, attention, launches, links, disk, collectives.

Each figure takes a few seconds at most, all together less than a minute. Sizes fill a device: smaller products and
copies measure how fast Python launches them.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.compose.bench.floor import seconds_of
from stoker.compose.calibrate_cpu import least_seconds
from stoker.compose.calibrate_cpu import measure as measure_cpu
from stoker.compose.hardware import probe
from stoker.compose.run_folder import versions
from stoker.errors import OutputError
from stoker.plan.calibration import Calibration
from stoker.plan.cpu import ATTENTION_HEAD, ATTENTION_TOKENS
from stoker.plan.hardware import Device

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]
_MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """How much is measured: `product`: of a square matrix; the others in MiB, but for attention's `tokens`."""

    product: int
    copy_mib: int
    tokens: int
    disk_mib: int
    calls: int
    collective_mib: int
    logits_mib: int = 64

    @classmethod
    def of(cls, kind: str) -> "Sizes":
        """Those that saturate a device of a kind."""
        if kind == "cuda":
            return cls(8192, 1024, 4096, 512, 2000, 256)
        return cls(1024, 128, ATTENTION_TOKENS, 256, 2000, 16)


def calibrate(where: Path, *, num_gpus: int = 1, sizes: Sizes | None = None, say: Say = print) -> Calibration:
    """Returns this machine's figures, those of its first GPU or of its CPU; `where`: a folder of the disk to measure.

    `num_gpus`: collectives run over so many processes, a GPU each (on a machine without GPUs: over so many of the
    CPU). `say` gets a line for each measurement.

    Raises:
        OutputError: the disk cannot be written. TrainingError: the processes of the collectives failed.
    """
    import torch

    hardware = probe()
    machine = hardware.first("cuda") or hardware.first("cpu")
    assert machine is not None
    sizes = sizes or Sizes.of(machine.kind)
    device = torch.device(machine.kind)
    say(f"measuring {machine.name}")
    written, read = _disk(where, sizes, say)  # first: it is what can be refused
    products = _products(machine, device, sizes, say)
    dtype = "bf16" if machine.bf16 and machine.kind == "cuda" else "fp16" if machine.kind == "cuda" else "fp32"
    attention = _attention(device, dtype, sizes.tokens, 128 if machine.kind == "cuda" else ATTENTION_HEAD)
    say(f"  attention in {dtype:<4} {attention / 1e12:10,.2f} TFLOP/s")
    copy = _copy(device, sizes, say)
    call = _call(device, sizes, say)
    to_device, to_host = _host_link(device, sizes, say)
    on_cpu: dict[str, float] = {}
    if machine.kind == "cpu":
        on_cpu = measure_cpu(partial(_attention, device, dtype), logits_mib=sizes.logits_mib, say=say)
    collectives = {}
    if num_gpus > 1:
        from stoker.compose.collectives import measure

        collectives = {str(num_gpus): measure(num_gpus, sizes.collective_mib * _MIB, say=say)}
    return Calibration(
        device=machine.name,
        host=platform.node(),
        date=datetime.date.today().isoformat(),
        products=products,
        copy=copy,
        attention=attention,
        attention_dtype=dtype,
        call_seconds=call,
        to_device=to_device,
        to_host=to_host,
        disk_write=written,
        disk_read=read,
        collectives=collectives,
        versions=versions(),
        cpu=on_cpu,
    )


def _products(machine: Device, device: "torch.device", sizes: Sizes, say: Say) -> dict[str, float]:
    """FLOP/s of a large square product by dtype, over a second of them: a card slows as it warms."""
    import torch

    dtypes = {"fp32": torch.float32}
    if machine.kind == "cuda":
        dtypes |= {"fp16": torch.float16} | ({"tf32": torch.float32, "bf16": torch.bfloat16} if machine.bf16 else {})
    elif machine.bf16:
        dtypes |= {"bf16": torch.bfloat16}
    found = {}
    before = torch.get_float32_matmul_precision()
    for name, dtype in dtypes.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        # fp32 products without the matrix units take twenty times as long.
        size = sizes.product // 2 if name == "fp32" and machine.kind == "cuda" else sizes.product
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _sustained(lambda a=left, b=right: a @ b, device)
        say(f"  products in {name:<5} {found[name] / 1e12:10,.2f} TFLOP/s")
    torch.set_float32_matmul_precision(before)
    capability = machine.compute_capability
    if machine.kind == "cuda" and capability is not None and capability >= (8, 9):
        found["fp8"] = _fp8(device, sizes.product)
        say(f"  products in fp8   {found['fp8'] / 1e12:10,.2f} TFLOP/s")
    return found


def _fp8(device: "torch.device", size: int) -> float:
    import torch

    one = torch.ones((), device=device)
    left, right = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    return (
        2
        * size**3
        / _sustained(
            lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
            device,
        )
    )


def _sustained(run: Callable[[], object], device: "torch.device", *, at_least: float = 0.5) -> float:
    """Seconds of `run`, after as many as take half a second on a GPU; on a CPU the least of many turns."""
    if device.type == "cpu":
        return least_seconds(run)
    seconds = seconds_of(run, device)
    if device.type == "cuda":
        for _ in range(min(2000, int(at_least / max(seconds, 1e-6)))):
            run()
        seconds = seconds_of(run, device)
    return max(seconds, 1e-9)


def _attention(device: "torch.device", dtype: str, tokens: int, head_dim: int = 128) -> float:
    """FLOP/s of causal attention with 8 heads, forward and backward."""
    import torch

    from stoker.kernels.attention import attention

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    rows = 4 if device.type == "cuda" else 1
    q, k, v = (torch.randn(rows, tokens, 8, head_dim, device=device).to(kind).requires_grad_() for _ in range(3))
    weight = torch.randn_like(q)

    def run() -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), weight)

    pairs = rows * tokens * (tokens + 1) / 2
    # Two products forward and four backward of 2 * head_dim a pair (arXiv:2204.02311, appendix B).
    return 12 * 8 * head_dim * pairs / _sustained(run, device)


def _copy(device: "torch.device", sizes: Sizes, say: Say) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    import torch

    source = torch.ones(sizes.copy_mib * _MIB // 4, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / _sustained(lambda: target.copy_(source), device)
    say(f"  memory           {rate / 1e9:10,.1f} GB/s")
    return rate


def _call(device: "torch.device", sizes: Sizes, say: Say) -> float:
    """Seconds of one small operation, launched from Python."""
    import torch

    value = torch.ones(16, device=device)
    for _ in range(10):
        value.add_(1.0)
    _wait(device)
    if device.type == "cpu":
        seconds = least_seconds(lambda: value.add_(1.0))
        say(f"  a launch         {seconds * 1e6:10,.2f} us")
        return seconds
    start = time.perf_counter()
    for _ in range(sizes.calls):
        value.add_(1.0)
    seconds = (time.perf_counter() - start) / sizes.calls
    _wait(device)
    say(f"  a launch         {seconds * 1e6:10,.2f} us")
    return seconds


def _host_link(device: "torch.device", sizes: Sizes, say: Say) -> tuple[float, float]:
    """Bytes a second of pinned copies to the device and back; a CPU has none."""
    import torch

    if device.type != "cuda":
        return 0.0, 0.0
    there = torch.empty(sizes.copy_mib * _MIB // 4, device=device)
    here = torch.empty(there.shape, pin_memory=True)
    to_device = there.nbytes / seconds_of(lambda: there.copy_(here, non_blocking=True), device)
    to_host = there.nbytes / seconds_of(lambda: here.copy_(there, non_blocking=True), device)
    say(f"  host to device   {to_device / 1e9:10,.1f} GB/s, back {to_host / 1e9:,.1f} GB/s")
    return to_device, to_host


def _disk(where: Path, sizes: Sizes, say: Say) -> tuple[float, float]:
    """Bytes a second written to the disk, flushed, and read again past the system's cache where it can be dropped."""
    path = where / f".stoker-disk-{os.getpid()}"
    block, count = os.urandom(16 * _MIB), max(1, sizes.disk_mib // 16)
    try:
        where.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(count):
                file.write(block)
            os.fsync(file.fileno())
            written = len(block) * count / (time.perf_counter() - start)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(16 * _MIB):
                pass
        read = len(block) * count / (time.perf_counter() - start)
    except OSError as error:
        raise OutputError(
            f"the disk of {where} cannot be measured: {error.strerror or error}.", fix="Name another by --folder."
        ) from None
    finally:
        with suppress(OSError):
            path.unlink()
    say(f"  disk             {written / 1e9:10,.2f} GB/s written, {read / 1e9:,.2f} GB/s read")
    return written, read


def _wait(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
