"""The processes of a run: which one this is, whoever started them, and what they say to each other."""

import atexit
import datetime
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from stoker.distributed import rounds
from stoker.errors import TrainingError

_T = TypeVar("_T")

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a rank waits for the others, who may be writing a checkpoint, before it gives them up."""

_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class Place:
    """Which process of a run this is: `rank` of `world_size`, and `local_rank` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    starter: str = ""
    """What started the processes: "torchrun" (or what sets the same variables, as accelerate does), "slurm", "mpi"."""


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Returns the place that an outer launcher gave this process; None where there is none.

    torchrun, and what speaks as it does, sets RANK, WORLD_SIZE and LOCAL_RANK; Slurm's srun numbers its tasks, and so
    does Open MPI's mpirun.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = int(environment["RANK"])
        return Place(rank, int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", rank)), "torchrun")
    # SLURM_NTASKS is there in the batch script too, which is one process; this one is set by srun alone.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Place(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            "slurm",
        )
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return Place(
            int(environment["OMPI_COMM_WORLD_RANK"]),
            int(environment["OMPI_COMM_WORLD_SIZE"]),
            int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]),
            "mpi",
        )
    return None


def first_host(node_list: str) -> str:
    """Returns the first of Slurm's hosts: "gpu07" of "gpu[07-09,12],login1"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        raise ValueError(f"{node_list!r} names no host")
    return "".join(part or "" for part in match.groups())


class Ranks:
    """All processes of a run, of which this is one; alone without a process group."""

    def __init__(
        self, place: Place | None = None, *, is_joined: bool = False, store: "dist.Store | None" = None
    ) -> None:
        self.place = place or Place()
        self.store = store
        """Where they leave words for each other without waiting; None where this one is alone."""
        self._is_joined = is_joined

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        """Whether it is this process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Returns the element-wise sum over ranks in fp64; every rank must call it."""
        if not self._is_joined:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: _T) -> list[_T]:
        """Returns every rank's value, in their order; every rank must call it."""
        if not self._is_joined:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, make: Callable[[], _T]) -> _T:
        """Returns what `make` returns on the first rank, on every rank; every rank must call it."""
        if not self._is_joined:
            return make()
        held: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(held)
        return held[0]

    def wait_for_all(self, what: str) -> None:
        """Returns once every rank has called it with `what`, however long that takes: no collective times out over it.

        Each name waits once.
        """
        if self.store is None:
            return
        self.store.set(f"{what}-{self.rank}", "1")
        keys, pause = [f"{what}-{rank}" for rank in range(self.world_size)], 0.01
        while not self.store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Refuses to begin where ranks differ in one of `facts`; every rank must call it.

        Raises:
            TrainingError: they do; it names all facts in which the first such rank does, and both values.
        """
        found = self.gather(dict(facts))
        first = found[0]
        for rank, other in enumerate(found):
            names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            if names:
                values = (f"{one}: rank 0 has {first.get(one)}, rank {rank} has {other.get(one)}" for one in names)
                raise TrainingError(
                    f"the processes differ in {'; in '.join(values)}.",
                    fix="Give every machine the same environment, the same YAML and the same data.",
                )

    def leave(self) -> None:
        """Ends the process group, if this process joined one."""
        if self._is_joined:
            self._is_joined = False
            dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends this process, which had joined others, with `code`: runs its exit hooks, but not the interpreter's own end.

    A process group's threads may outlive it, and drop the last tensors that they held once the interpreter is being
    taken down. Before Python 3.14 a thread that then asks for the lock is ended by unwinding its stack, which C++
    answers with `terminate called without an active exception`: a run that has saved all it had would end by SIGABRT.
    """
    with suppress(Exception):  # It has been told, and the next hook was run.
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # Nobody reads it any more.
            stream.flush()
    os._exit(code)


def join(place: Place | None, *, kind: str, group: bool = False, timeout: datetime.timedelta = TIMEOUT) -> Ranks:
    """Returns the processes that this one belongs to, joined so that they can speak; alone without a `place`.

    `kind` is that of the device that each trains on: "cuda" speaks NCCL for tensors there, and gloo on the host.
    `group`: there is a process group even for one process, for a strategy that needs one. `timeout` is how long one
    waits for the others in a collective.

    Raises:
        TrainingError: they do not find each other.
    """
    if place is None and not group:
        return Ranks()
    backend = "gloo"
    if kind == "cuda":
        torch.cuda.set_device(0 if place is None else place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if place is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Ranks(is_joined=True)
    for name, value in _first_address(place, os.environ).items():
        os.environ.setdefault(name, value)
    store, rank, world_size = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    store = dist.PrefixStore(rounds.agree(store, rank=rank, world_size=world_size, timeout=timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Ranks(place, is_joined=True, store=store)


def _first_address(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns where the first process listens, as far as the launcher says it; torchrun sets both variables.

    Raises:
        TrainingError: nothing says it.
    """
    if place.starter == "slurm":
        port = _PORTS[int(environment.get("SLURM_JOB_ID", "0")) % len(_PORTS)]
        return {"MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]), "MASTER_PORT": str(port)}
    if place.starter == "mpi" and environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == environment["OMPI_COMM_WORLD_SIZE"]:
        # Processes of one mpirun have the same parent, so two runs beside each other have two ports.
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_PORTS[os.getppid() % len(_PORTS)])}
    if "MASTER_ADDR" not in environment:
        raise TrainingError(
            "nothing says where the first process listens: MASTER_ADDR is not set.",
            fix="With mpirun over several machines: -x MASTER_ADDR=HOST -x MASTER_PORT=29500, HOST being the first.",
        )
    return {"MASTER_PORT": "29500"}
