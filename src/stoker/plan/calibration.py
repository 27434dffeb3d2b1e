"""What `stoker doctor --calibrate` measured on this machine, in place of data sheets and rules of thumb.

One JSON file a device lies in the machine folder (`$STOKER_CACHE`, else ~/.cache/stoker/machine), with the date, the
host and the versions that it was measured with. It is used where device and host are the same.
"""

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.errors import OutputError
from stoker.plan.cpu import CpuRates
from stoker.plan.links import LINK_SHARE

if TYPE_CHECKING:
    from stoker.plan.rates import Rates

_FORM = 1
# Of what a product, a copy and attention reach alone, the share that they reach inside a step: 682 of 790 TFLOP/s,
# 3.83 of 4.16 TB/s, and all of 426 TFLOP/s, on one H200 (docs/engine_log.md). Rules of thumb elsewhere.
_PRODUCT_IN_STEP, _COPY_IN_STEP, _ATTENTION_IN_STEP = 0.86, 0.92, 1.0
_ATTENTION_TOKENS = 4096
# Calls of a layer, forward and backward, fused and op by op: what the measured 0.6 and assumed 1.5 ms are at 5 us a
# call. A rule of thumb.
_CALLS_FUSED, _CALLS_OP_BY_OP = 120, 300
# The same of a CPU, whose caches a step uses for more than one product (benchmarks/results/plan_proof_cpu.csv).
_PRODUCT_ON_CPU, _ATTENTION_ON_CPU = 0.75, 0.7
# A figure that cannot be: the machine was not idle, or the clock stood still.
_LEAST = 1e-12


@dataclass(frozen=True)
class Calibration:
    """Figures of one device: FLOP/s of products by dtype and of attention, bytes a second of the rest.

    Attention has heads of 128, on a CPU of 64. `attention_dtype`: that of attention's inputs. `call_seconds`: of one
    small operation, launched and done with no one waiting. `to_device` and `to_host`: pinned copies (0 on a CPU).
    `collectives`: by number of processes, the bus bandwidth and latency of an all-reduce and an all-gather. `cpu`: of a
    CPU, what `compose.calibrate_cpu` returns.
    """

    device: str
    host: str
    date: str
    products: Mapping[str, float]
    copy: float
    attention: float
    attention_dtype: str
    call_seconds: float
    to_device: float = 0.0
    to_host: float = 0.0
    disk_write: float = 0.0
    disk_read: float = 0.0
    collectives: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    cpu: Mapping[str, float] = field(default_factory=dict)
    form: int = _FORM

    @property
    def source(self) -> str:
        """Whose figures these are, for people."""
        return f"rates measured here on {self.date} (stoker doctor --calibrate)"

    def rates(self, known: "Rates") -> "Rates":
        """Returns the figures of a device of the catalogue with what was measured in their place."""
        device = known.device
        rates = {**device.rates, **{name: rate for name, rate in self.products.items() if rate > _LEAST}}
        reach, found = rates.get(self.attention_dtype, rates["fp32"]), known.efficiencies
        link = max((one["bus_bytes_per_second"] for one in self.collectives.values()), default=0.0)
        measured = replace(
            device,
            rates=rates,
            bandwidth=self.copy,
            basis="measured",
            host_link=min(self.to_device, self.to_host) or device.host_link,
            device_link=2 * link / LINK_SHARE if link else device.device_link,
        )
        loading = [speed for speed in (self.disk_read, self.to_device) if speed > 0]
        attention = found.attention
        if self.attention > 0:  # of longer rows than were measured: see `Efficiencies.attention_half`
            longer = 1.0 + found.attention_half / _ATTENTION_TOKENS
            attention = longer * _ATTENTION_IN_STEP * self.attention / reach
        efficiencies = replace(
            found,
            matmul=_PRODUCT_IN_STEP,
            matmul_fp8=_PRODUCT_IN_STEP if "fp8" in self.products else found.matmul_fp8,
            attention=attention,
            bandwidth=_COPY_IN_STEP,
            host_link=1.0 if self.to_device else found.host_link,
            call_seconds=self.call_seconds,
            layer_launch_seconds=_CALLS_FUSED * self.call_seconds,
            op_by_op_launch_seconds=_CALLS_OP_BY_OP * self.call_seconds,
            load_bandwidth=min(loading, default=found.load_bandwidth),
            disk_bandwidth=min(
                (one for one in (self.disk_read, self.disk_write) if one > 0), default=found.disk_bandwidth
            ),
            source=self.source,
        )
        if self.cpu:
            own = {name: value for name, value in self.cpu.items() if name != "head_power"}
            efficiencies = replace(
                efficiencies,
                matmul=_PRODUCT_ON_CPU,
                attention=_ATTENTION_ON_CPU * self.attention / reach if self.attention > 0 else found.attention,
                attention_head=self.cpu["head_power"],
                cpu=CpuRates(**own),
            )
        return replace(known, device=measured, efficiencies=efficiencies, is_known=True)


def folder() -> Path:
    """Returns the folder of what is known of this machine: `$STOKER_CACHE`, else ~/.cache/stoker/machine."""
    return Path(os.environ.get("STOKER_CACHE") or "~/.cache/stoker/machine").expanduser()


def make_folder() -> None:
    """Makes the folder of what is known of this machine; raises OutputError where it cannot be written."""
    path = folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be made: {error.strerror or error}.", fix="Name another folder by STOKER_CACHE."
        ) from None


def path_of(device: str) -> Path:
    """Returns the file of a device of this host."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{platform.node()}-{device}".lower()).strip("-")
    return folder() / f"calibration-{name}.json"


def save(one: Calibration) -> Path:
    """Writes what was measured, in place of what was measured before, and returns the file.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = path_of(one.device)
    make_folder()
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(asdict(one), indent=1), encoding="utf-8")
    beside.replace(path)
    return path


def load(device: str) -> Calibration | None:
    """Returns what was measured of a device of this name on this host; None where nothing usable was."""
    try:
        facts = json.loads(path_of(device).read_text(encoding="utf-8"))
        one = Calibration(**facts)
    except (OSError, ValueError, TypeError):
        return None
    is_same = one.form == _FORM and one.device == device and one.host == platform.node()
    return one if is_same and one.copy > _LEAST and one.products else None


def measured_here(device: str, known: "Rates") -> "Rates":
    """Returns the figures of the device of this name as measured on this host, or `known` where they were not."""
    one = load(device)
    return known if one is None else one.rates(known)
