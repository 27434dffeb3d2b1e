"""Saves checkpoints of one or many ranks in parallel, while training goes on."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from stoker.checkpoint import pieces as parts
from stoker.checkpoint import write
from stoker.checkpoint.pieces import Gather, HostCopies, Pieces
from stoker.errors import CheckpointError, Problem

# Of the free host memory, that copies of the state may take together.
_SHARE = 0.5


@dataclass(frozen=True)
class Saved:
    """A checkpoint that stands: of which step, where, how large, and for how many seconds it held up training."""

    step: int
    path: Path
    num_bytes: int
    seconds: float


class Saver:
    """Writes the checkpoints in `folder`: `begin` starts one, and `commit` makes it one, after it has been written.

    In between it is no checkpoint, whatever happens, and those before stand. Every rank must call both; no rank speaks
    to another in between. `background` None: beside training where the host's memory has room for a copy of the state.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        gather: Gather = lambda value: [value],
        background: bool | None = None,
    ) -> None:
        self.folder = folder
        self._rank, self._world_size, self._gather, self._background = rank, world_size, gather, background
        self._copies = HostCopies()
        self._writing: _Writing | None = None

    @property
    def step(self) -> int | None:
        """The step whose checkpoint has begun and is not committed yet; the same on every rank."""
        return None if self._writing is None else self._writing.step

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part, or failed to."""
        return self._writing is None or not self._writing.thread.is_alive()

    def begin(self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Starts to write the checkpoint of `step`: `tensors` as they are now, and the first rank's `values`.

        Raises:
            CheckpointError: the folder cannot be written. ValueError: one is still being written.
        """
        if self._writing is not None:
            raise ValueError(f"the checkpoint of step {self._writing.step} is still being written")
        started = time.perf_counter()
        self._agree(write.prepare, self.folder, step, speaks=self._rank == 0)
        mine = parts.assign(tensors, rank=self._rank, world_size=self._world_size, gather=self._gather)
        waits = not self._in_background(mine)
        writing = _Writing(self, step, mine if waits else self._copies.of(mine), values)
        writing.thread.start()
        if waits:
            writing.thread.join()
        writing.held_up = time.perf_counter() - started
        self._writing = writing

    def commit(self) -> Saved:
        """Waits until every rank has written its part, and gives the checkpoint its name.

        Raises:
            CheckpointError: a rank could not write; it names the rank, and what was there before still stands.
        """
        started, writing = time.perf_counter(), self._writing
        assert writing is not None, "nothing has begun"
        writing.thread.join()
        self._writing = None
        found = self._gather((writing.files, writing.fault))
        for rank, (_, fault) in enumerate(found):
            if fault is not None:
                if self._rank == 0:
                    write.abandon(self.folder, writing.step)
                raise _on_rank(fault, rank, self._world_size)
        files = {name: facts for mine, _ in found for name, facts in mine.items()}
        _, num_bytes = self._agree(
            write.commit, self.folder, writing.step, files, writing.values, speaks=self._rank == 0
        )
        path = write.path_of(self.folder, writing.step)
        return Saved(writing.step, path, num_bytes, writing.held_up + time.perf_counter() - started)

    def file_name(self, group: str) -> str:
        """Returns the file that holds this rank's part of a group of tensors."""
        place = "" if self._world_size == 1 else f"-{self._rank + 1:05d}-of-{self._world_size:05d}"
        return f"{group}{place}.safetensors"

    def _in_background(self, mine: Pieces) -> bool:
        if self._background is not None:
            return self._background
        ranks_here = self._world_size  # at most: those of other machines have other memory
        return parts.num_bytes(mine) * ranks_here < _SHARE * psutil.virtual_memory().available

    def _agree(self, work: Any, *arguments: Any, speaks: bool) -> Any:
        """What `work` returns on the rank that `speaks`, on every rank; what it raises there, too."""
        outcome: Any = None, None
        if speaks:
            try:
                outcome = work(*arguments), None
            except CheckpointError as error:
                outcome = None, error.problems[0]
        value, fault = self._gather(outcome)[0]
        if fault is not None:
            raise CheckpointError([fault])
        return value


class _Writing:
    """One rank's part of a checkpoint on its way to the disk, in a thread that ends with the process."""

    def __init__(self, saver: Saver, step: int, pieces: Pieces, values: Mapping[str, Any]) -> None:
        self.step, self.values, self.held_up = step, values, 0.0
        self.files: dict[str, dict[str, Any]] = {}
        self.fault: Problem | None = None
        self._saver, self._pieces = saver, pieces
        self.thread = threading.Thread(target=self._run, name=f"checkpoint {step}", daemon=True)

    def _run(self) -> None:
        folder = self._saver.folder
        try:
            for group, named in self._pieces.items():
                name = self._saver.file_name(group)
                self.files[name] = write.write_group(folder, self.step, name, named)
        except CheckpointError as error:
            self.fault = error.problems[0]
        except Exception as error:  # noqa: BLE001 - nobody would hear of it in this thread
            self.fault = Problem(f"The checkpoint of step {self.step} cannot be written: {error!r}.")
        finally:
            self._pieces = {}


def _on_rank(fault: Problem, rank: int, world_size: int) -> CheckpointError:
    where = f"rank {rank} of {world_size}" if world_size > 1 else None
    return CheckpointError(fault.what, where=where, fix=fault.fix)
