"""Tasks dealt out to the processes of a run: each does its part, and all get all results."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

from stoker.data.workers import Pool

Exchange = Callable[[Any], list[Any]]
"""Gives a picklable value to the other ranks and returns everyone's, in the order of ranks; every rank must call it."""


@dataclass(frozen=True)
class _Failed:
    """What a rank hands on instead of a result."""

    error: Exception


class _Ended:
    """What a rank hands on that has no task left."""


class SharedPool:
    """A pool whose task number n runs on rank n modulo `world_size`, in that rank's own `pool`.

    `map` gives the same results in the same order on every rank, provided that every rank maps equal tasks and asks
    for results alike, in the thread that it speaks to the others in. Tasks of other ranks are taken from the iterable
    and dropped. What a task raises on one rank is raised on all of them.
    """

    def __init__(self, pool: Pool, exchange: Exchange, *, rank: int, world_size: int) -> None:
        self._pool = pool
        self._exchange = exchange
        self._rank = rank
        self._world_size = world_size

    def __enter__(self) -> "SharedPool":
        self._pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._pool.__exit__(kind, error, trace)

    def map(self, name: str, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the results of all tasks in order; a round of one task a rank is exchanged at a time."""
        results = self._pool.map(name, self._own(tasks))
        while True:
            for result in self._exchange(_next(results)):
                if isinstance(result, _Ended):
                    return
                if isinstance(result, _Failed):
                    raise result.error
                yield result

    def _own(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields this rank's tasks, each when all of its round are taken: their results will be there at once."""
        rounds = iter(tasks)
        while True:
            own, taken = [], 0
            for taken, task in enumerate(islice(rounds, self._world_size), start=1):
                if taken == self._rank + 1:
                    own.append(task)
            yield from own
            if taken < self._world_size:
                return


def _next(results: Iterator[Any]) -> Any:
    try:
        return next(results, _Ended())
    except Exception as error:  # noqa: BLE001 - raised again on every rank, none of which may wait for a dead one
        return _Failed(error)
