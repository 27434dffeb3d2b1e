"""`plan`: what `stoker plan` should know besides the run."""

from typing import Literal

from stoker.config.sections.section import Positive, Section, Text


class PlannedDevice(Section):
    """A device for `stoker plan`: what is not set is as in the catalogue under its name, or under that of `like`."""

    like: Text | None = None
    """A device of the catalogue to take the other figures from: `h100`."""
    name: Text | None = None
    """What it is called in tables."""
    memory_gib: Positive | None = None
    """Its memory in binary gigabytes, as cards of 24 or 80 have them."""
    memory_gb: Positive | None = None
    """The same in gigabytes of 10^9 bytes, as on some data sheets."""
    usable_gib: Positive | None = None
    """What is free of it when nothing runs; 98.5% of it unless set."""
    bandwidth: Positive | None = None
    """Of its memory, GB/s."""
    rates: dict[Literal["fp32", "tf32", "fp16", "bf16", "fp8"], Positive] | None = None
    """Dense matrix products by number format, TFLOP/s; a format that is not there is not computed in."""
    capability: Text | None = None
    """CUDA compute capability: `"9.0"`."""
    host_link: Positive | None = None
    """To the host's memory, one direction, GB/s."""
    nvlink: Positive | None = None
    """To its peers, both directions, GB/s."""
    network: Positive | None = None
    """Into a node of such devices, all adapters together, GB/s."""
    price: Positive | None = None
    """US dollars an hour for one."""
    source: Text | None = None
    """Where the figures are from."""


class Planning(Section):
    """What `stoker plan` should know besides the run."""

    devices: dict[Text, PlannedDevice] = {}
    """Your own devices and prices by name, which `--gpu` understands: `{mine: {like: h100, price: 1.99}}`."""
