"""Figures of a GPU that the catalogue lacks, from what its driver reports: multiprocessors, clocks, memory."""

from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.hardware import Device

REPORTED = "reported"
"""`CatalogueDevice.basis` of such a device."""

# Operations a clock of one multiprocessor, dense, by compute capability: fp32 cores, and 16-bit products summed in fp32
# of data-centre and workstation cards, of which GeForce has half from Turing on. NVIDIA's whitepapers on Volta, Turing,
# Ampere, Ada, Hopper and Blackwell; T4, A100, RTX 4090 and H100 come out within 3% of their data sheets.
_A_CLOCK: dict[tuple[int, int], tuple[int, int]] = {
    (6, 0): (128, 256),
    (6, 1): (256, 4),
    (7, 0): (128, 1024),
    (7, 5): (128, 1024),
    (8, 0): (128, 2048),
    (8, 6): (256, 1024),
    (8, 9): (256, 1024),
    (9, 0): (256, 4096),
    (10, 0): (256, 8192),
    (12, 0): (256, 1024),
}
_HALVED = "geforce"
# From here on there are bf16 and tf32, and fp8.
_BF16, _FP8 = (8, 0), (8, 9)


def figures(device: Device, like: CatalogueDevice) -> CatalogueDevice | None:
    """Returns the device with its generation's rates at its clocks and the links of `like`; None without clocks.

    Without a memory clock the bandwidth is that of `like`, and `source` says so.
    """
    capability = device.compute_capability
    if capability is None or not device.multiprocessors or not device.clock_hz:
        return None
    generation = max((one for one in _A_CLOCK if one <= capability), default=None)
    if generation is None:
        return None
    single, half = _A_CLOCK[generation]
    if _HALVED in device.name.lower() and generation >= (7, 5):
        half //= 2
    clocks = device.multiprocessors * device.clock_hz
    rates = {"fp32": single * clocks, "fp16": half * clocks}
    if capability >= _BF16:
        rates |= {"bf16": half * clocks, "tf32": half / 2 * clocks}
    if capability >= _FP8:
        rates["fp8"] = 2.0 * half * clocks
    memory = "" if device.bandwidth else f", with the memory's bandwidth of {like.name}"
    return CatalogueDevice(
        key=device.name,
        name=device.name,
        vendor="nvidia",
        memory_bytes=device.memory_bytes,
        bandwidth=device.bandwidth or like.bandwidth,
        rates=rates,
        compute_capability=capability,
        host_link=like.host_link,
        device_link=0.0,
        source=f"{device.multiprocessors} multiprocessors of compute capability {capability[0]}.{capability[1]} at "
        f"{device.clock_hz / 1e6:,.0f} MHz, as its driver reports them{memory}",
        basis=REPORTED,
        price=None,
    )
