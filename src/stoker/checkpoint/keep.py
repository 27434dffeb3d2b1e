"""Decides which checkpoints stay: the last few, and the best."""

from collections.abc import Collection
from pathlib import Path

from stoker.checkpoint import folder as names


def keep(folder: Path, *, last: int, steps: Collection[int] = ()) -> list[int]:
    """Removes all but the `last` latest checkpoints and those of `steps` (the best); returns the steps removed.

    What cannot be removed is left: a checkpoint too many is no reason to stop a run.
    """
    if last < 1:
        raise ValueError(f"last = {last}: at least one checkpoint must stay")
    removed = []
    for entry in names.entries(folder)[last:]:
        if entry.step not in steps:
            try:
                names.remove(entry.path)
            except OSError:
                continue
            removed.append(entry.step)
    return removed
