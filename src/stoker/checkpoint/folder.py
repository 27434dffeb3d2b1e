"""Names inside a folder of checkpoints: `step-000123/{weights,optimizer,rng}.safetensors, state.json, manifest.json`.

What n ranks wrote together is in files of their own each, `weights-00001-of-0000n.safetensors` and so on.

Hidden names are unfinished work: `.step-000123.part` is being written, `.step-000123.deleted` is being removed.
`step-000123.replaced` is whole: it stands in while a new checkpoint of the same step takes its name.
`step-000123.damaged` was found not to be whole, and is left for a person to look at.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2

_NAME = re.compile(r"step-(\d+)(\.replaced)?")
_UNFINISHED = re.compile(r"\.step-\d+\.(part|deleted)")


@dataclass(frozen=True)
class Entry:
    """A checkpoint's folder, whole or not."""

    step: int
    path: Path
    is_replaced: bool = False


def path_of(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of `step` stands."""
    return folder / f"step-{step:06d}"


def entries(folder: Path) -> list[Entry]:
    """Returns the checkpoints in `folder`, the latest step first; one being replaced comes after its successor."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Entry(int(match[1]), path, match[2] is not None))
    return sorted(found, key=lambda entry: (-entry.step, entry.is_replaced))


def remove(path: Path) -> None:
    """Removes a checkpoint: renamed first, so that a half-removed one is never taken for a checkpoint."""
    hidden = path.parent / f".step-{_step(path)}.deleted"
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Renames a checkpoint that is not whole, so that it no longer counts as one; returns its new path.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    aside = path.with_name(f"{path.name.removesuffix('.replaced')}.damaged")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{path} is not whole and cannot be set aside: {error.strerror}.") from error
    return aside


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint")
    return match[1]
