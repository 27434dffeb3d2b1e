"""What is known of the speed of the machine at hand: a device's figures and the shares of them that steps reach.

One record holds both, so that what was measured on a machine can take the place of the catalogue's figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from stoker.plan import calibration, catalogue
from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.efficiencies import MEASURED, ON_CPU, Efficiencies
from stoker.plan.hardware import Device
from stoker.plan.reported import REPORTED, figures

CORES = 16
"""Of the catalogue's CPU."""
# So many threads take all that a typical machine's memory gives. A rule of thumb.
_THREADS_OF_MEMORY = 8
# An Apple GPU, of which the catalogue has none, is taken to be as fast as this one.
_LIKE_APPLE = "rtx3060"


@dataclass(frozen=True)
class Rates:
    """A device's figures with efficiencies; `is_known`: they are its own, not those of one that is like it."""

    device: CatalogueDevice
    efficiencies: Efficiencies = MEASURED
    is_known: bool = True


def of(device: Device, *, num_threads: int = CORES) -> Rates:
    """Returns the figures of a machine's device: as measured on this host, or else by the catalogue: those of its name,
    or of the one that is most like it."""
    return calibration.measured_here(device.name, of_catalogue(device, num_threads=num_threads))


def on_threads(num_threads: int) -> Efficiencies:
    """Returns the efficiencies of a CPU that was not measured: its elementwise work goes as fast as its threads do."""
    one = ON_CPU.cpu
    several = replace(
        one,
        in_caches=one.in_caches * num_threads,
        in_memory=one.in_memory * min(num_threads, _THREADS_OF_MEMORY),
        logit_seconds=one.logit_seconds / num_threads,
    )
    return replace(ON_CPU, cpu=several)


@cache
def of_catalogue(device: Device, *, num_threads: int = CORES) -> Rates:
    """Returns the figures of a machine's device by the catalogue alone, as `of` does where nothing was measured."""
    known = catalogue.shipped()
    if device.kind == "cpu":
        cpu = known["cpu"]
        rates = {dtype: rate * num_threads / CORES for dtype, rate in cpu.rates.items()}
        return Rates(
            replace(cpu, name=device.name, memory_bytes=device.memory_bytes, rates=rates), on_threads(num_threads)
        )
    if device.kind == "mps":
        like = replace(
            known[_LIKE_APPLE], name=device.name, vendor="apple", memory_bytes=device.memory_bytes, price=None
        )
        return Rates(replace(like, basis=REPORTED, source=f"taken to be those of a {like.key}"), is_known=False)
    found = catalogue.by_name(device.name, known)
    if found is not None:
        return Rates(found)
    like = _most_like(device, known)
    reckoned = figures(device, like)
    if reckoned is not None:
        return Rates(reckoned, is_known=False)
    taken = replace(like, name=device.name, memory_bytes=device.memory_bytes, price=None, basis=REPORTED)
    return Rates(replace(taken, source=f"taken to be those of the {like.name}, the most like it"), is_known=False)


def _most_like(device: Device, known: Mapping[str, CatalogueDevice]) -> CatalogueDevice:
    """The GPU of the nearest compute capability, and of those of the nearest memory."""

    def distance(one: CatalogueDevice) -> tuple[float, float]:
        mine, its = device.compute_capability or (0, 0), one.compute_capability or (0, 0)
        return abs(mine[0] + mine[1] / 10 - its[0] - its[1] / 10), abs(device.memory_bytes - one.memory_bytes)

    return min((one for one in known.values() if one.vendor != "cpu"), key=distance)
