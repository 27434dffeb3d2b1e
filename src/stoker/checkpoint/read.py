"""Loads checkpoints; one that is not whole is recognised by its hashes, and the one before it is used."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.checkpoint import folder as names
from stoker.checkpoint.manifest import fault_of
from stoker.checkpoint.stored import StoredTensors
from stoker.errors import CheckpointError

FindFault = Callable[[Path, int], str | None]
"""From a checkpoint's folder and step to what is wrong with it; None when it is whole."""

_OF_RANKS = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was passed over, and why."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True)
class Loaded:
    """The state after `step` steps: tensors by group and name, read to the CPU when asked for, and plain values."""

    step: int
    path: Path
    tensors: Mapping[str, StoredTensors]
    values: Mapping[str, Any]
    rejected: tuple[Rejected, ...] = ()


def load_latest(folder: Path, *, find_fault: FindFault = fault_of) -> Loaded | None:
    """Returns the latest whole checkpoint of `folder`, or None when there is none at all.

    Those that were passed over are in `rejected`, with the reason. `find_fault` looks at one: ranks that read it
    together may share the work.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
    """
    rejected: list[Rejected] = []
    for entry in names.entries(folder):
        fault = find_fault(entry.path, entry.step)
        if fault is None:
            return _load(entry.path, entry.step, tuple(rejected))
        rejected.append(Rejected(entry.path, fault))
    if rejected:
        raise CheckpointError(
            f"No checkpoint in {folder} is whole: {'; '.join(map(str, rejected))}.",
            fix="Restore one from a backup, or start the run anew with --overwrite.",
        )
    return None


def load(path: Path) -> Loaded:
    """Returns the checkpoint in `path` (a `step-...` folder).

    Raises:
        CheckpointError: it is missing or not whole.
    """
    for entry in names.entries(path.parent):
        if entry.path.name == path.name:
            fault = fault_of(entry.path, entry.step)
            if fault is not None:
                raise CheckpointError(f"The checkpoint {path} is not whole: {fault}.", fix="Use another one.")
            return _load(entry.path, entry.step, ())
    there = ", ".join(entry.path.name for entry in names.entries(path.parent))
    fix = f"There are {there}." if there else "Name a folder called step-<number>."
    raise CheckpointError(f"There is no checkpoint {path}.", fix=fix)


def _load(path: Path, step: int, rejected: tuple[Rejected, ...]) -> Loaded:
    groups: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.safetensors")):
        groups.setdefault(_OF_RANKS.sub("", file.stem), []).append(file)
    tensors = {group: StoredTensors(files) for group, files in groups.items()}
    values = json.loads((path / names.STATE).read_bytes())
    return Loaded(step, path, tensors, values, rejected)
