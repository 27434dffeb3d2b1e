"""What all adapters of a model share."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSettings:
    """What all adapters of a model share; the update of a weight is `scaling * B @ A`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} is not positive")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout = {self.dropout} is not in [0, 1)")

    @property
    def scaling(self) -> float:
        """Returns alpha / rank, or alpha / sqrt(rank) when rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
