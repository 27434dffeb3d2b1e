"""What is known of the speed of the machine at hand: a device's figures and the shares of them that steps reach.

One record holds both, so that what was measured on a machine can take the place of the catalogue's figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from stoker.plan import calibration, catalogue
from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.efficiencies import MEASURED, Efficiencies
from stoker.plan.hardware import Device

# The catalogue's CPU has so many cores.
_CORES = 16
# An Apple GPU, of which the catalogue has none, is taken to be as fast as this one.
_LIKE_APPLE = "rtx3060"


@dataclass(frozen=True)
class Rates:
    """A device's figures with efficiencies; `is_known`: they are its own, not those of one that is like it."""

    device: CatalogueDevice
    efficiencies: Efficiencies = MEASURED
    is_known: bool = True


def of(device: Device, *, num_threads: int = _CORES) -> Rates:
    """Returns the figures of a machine's device: as measured on this host, or else by the catalogue: those of its name,
    or of the one that is most like it."""
    return calibration.measured_here(device.name, _by_catalogue(device, num_threads))


@cache
def _by_catalogue(device: Device, num_threads: int) -> Rates:
    known = catalogue.shipped()
    if device.kind == "cpu":
        cpu = known["cpu"]
        rates = {dtype: rate * num_threads / _CORES for dtype, rate in cpu.rates.items()}
        return Rates(replace(cpu, name=device.name, memory_bytes=device.memory_bytes, rates=rates))
    if device.kind == "mps":
        return Rates(replace(known[_LIKE_APPLE], memory_bytes=device.memory_bytes), is_known=False)
    found = catalogue.by_name(device.name, known)
    return Rates(found) if found is not None else Rates(_most_like(device, known), is_known=False)


def _most_like(device: Device, known: Mapping[str, CatalogueDevice]) -> CatalogueDevice:
    """The GPU of the nearest compute capability, and of those of the nearest memory."""

    def distance(one: CatalogueDevice) -> tuple[float, float]:
        mine, its = device.compute_capability or (0, 0), one.compute_capability or (0, 0)
        return abs(mine[0] + mine[1] / 10 - its[0] - its[1] / 10), abs(device.memory_bytes - one.memory_bytes)

    return min((one for one in known.values() if one.vendor != "cpu"), key=distance)
