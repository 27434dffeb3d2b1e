"""Seconds of a collective: within a node over the devices' own links, between nodes over the node's network.

All devices of a node share its network, so that what another node has comes in once for all of them.
"""

from dataclasses import dataclass

from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.spread import Spread

# Of a link's figure one way: NCCL's collectives of 268 MB on NVLink, 450 GB/s on two H200: sums 302 GB/s, gathers
# 246, scattered sums 231, multicast off (benchmarks/results/scaling.json). Rules of thumb: over PCIe through the host
# where devices have no link of their own; of a network by RDMA or sockets.
LINK_SHARE, _PCIE_SHARE, _NETWORK_SHARE = 0.58, 0.4, 0.8
# Before the first byte of a collective moves, in a node and between nodes, seconds: 21 to 27 us there; a rule of thumb.
_LATENCY, _NETWORK_LATENCY = 25e-6, 60e-6


@dataclass(frozen=True)
class Links:
    """What moves between devices, bytes a second: `device` into one from its node, `network` into a node."""

    device: float
    network: float

    @classmethod
    def of(cls, device: CatalogueDevice) -> "Links":
        """Those of a device of the catalogue."""
        own = LINK_SHARE * device.device_link / 2  # the catalogue's figure counts both directions
        return cls(own or _PCIE_SHARE * device.host_link, _NETWORK_SHARE * device.network)

    def seconds(self, count: float, spread: Spread, *, collectives: int = 1, passes: int = 1) -> float:
        """Returns what gathering or summing `count` bytes takes, in so many collectives; `passes`: 2 for a sum."""
        if spread.num_processes == 1 or not count:
            return 0.0
        here = min(spread.per_node, spread.num_processes)
        inside = count * (here - 1) / here / self.device if self.device else 0.0
        nodes = spread.nodes
        between = count * (nodes - 1) / nodes / self.network if nodes > 1 else 0.0
        return passes * (max(inside, between) + collectives * self._latency(nodes))

    def exchange_seconds(self, count: float, spread: Spread, *, exchanges: int) -> float:
        """Returns what so many exchanges take, into which each device that shares rows puts `count` bytes in all.

        Every device has something else for every other, so that devices of a node add up on its network.
        """
        size = spread.sharing
        if size == 1 or not count:
            return 0.0
        here = min(spread.per_node, size)
        inside = count * (here - 1) / size / self.device if self.device else 0.0
        nodes = -(-size // here)
        between = here * count * (size - here) / size / self.network if nodes > 1 else 0.0
        return max(inside, between) + exchanges * self._latency(nodes)

    @staticmethod
    def _latency(nodes: int) -> float:
        return _LATENCY + (_NETWORK_LATENCY if nodes > 1 else 0.0)
