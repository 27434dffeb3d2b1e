"""What the rehearsal of a first micro-batch took."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rehearsal:
    """Seconds of asking for kernels, in a small forward and backward that loads libraries, then until all are there.

    `num_kernels`: asked for, compiled on `num_threads` or read from the cache on disk.
    """

    asking_seconds: float
    waiting_seconds: float
    num_kernels: int
    num_threads: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.asking_seconds + self.waiting_seconds

    def describe(self) -> str:
        """Returns it in words, for a line about the first step."""
        return (
            f"{self.seconds:.1f} s of rehearsal: {self.asking_seconds:.1f} asking for {self.num_kernels} kernels, "
            f"{self.waiting_seconds:.1f} more until {self.num_threads} threads had them"
        )
