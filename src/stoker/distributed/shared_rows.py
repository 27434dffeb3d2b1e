"""Ranks that share the rows of a batch: neighbours, so that on one machine they speak over its fastest links."""

from dataclasses import dataclass
from typing import cast

import torch.distributed as dist

from stoker.distributed.ranks import Ranks


@dataclass(frozen=True)
class Sharing:
    """This rank is number `index` of the `size` that share rows, in `group`; there are `num_groups` such groups.

    `number`: of this rank's group, which is dealt its own rows, as a rank is where rows are not shared.
    """

    group: dist.ProcessGroup | None
    index: int
    size: int
    number: int
    num_groups: int


def share(ranks: Ranks, size: int) -> Sharing:
    """Returns this rank's place among those that share rows; every rank must call it.

    Raises:
        ValueError: `size` does not divide the number of ranks.
    """
    if ranks.world_size % size:
        raise ValueError(f"{ranks.world_size} ranks cannot share rows in groups of {size}")
    number, index = divmod(ranks.rank, size)
    count = ranks.world_size // size
    if size == 1:
        return Sharing(None, 0, 1, number, count)
    # All ranks make all groups, in the same order.
    groups = [dist.new_group(range(first, first + size)) for first in range(0, ranks.world_size, size)]
    return Sharing(cast("dist.ProcessGroup", groups[number]), index, size, number, count)
