"""Saves a checkpoint so that it is either whole or not there."""

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from stoker.checkpoint import folder as names
from stoker.checkpoint import tensors as safetensors_file
from stoker.checkpoint.durable import DurableFile, sync_folder
from stoker.checkpoint.folder import path_of
from stoker.checkpoint.manifest import facts_of, to_bytes
from stoker.checkpoint.pieces import Piece, whole
from stoker.errors import CheckpointError


def save(
    folder: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]
) -> tuple[Path, int]:
    """Saves the checkpoint of `step` in `folder`; returns where it stands and its size in bytes.

    Each item of `tensors` becomes `<name>.safetensors`, `values` (JSON) becomes `state.json`. All of it is written
    aside, hashed into `manifest.json`, flushed to the disk and then renamed: a process killed at any moment leaves the
    checkpoints that were there, and this one whole or not at all.

    Raises:
        CheckpointError: the disk is full or cannot be written; what was there before still stands.
    """
    prepare(folder, step)
    files = {}
    for name, group in whole(tensors).items():
        files[f"{name}.safetensors"] = write_group(folder, step, f"{name}.safetensors", group)
    return commit(folder, step, files, values)


def prepare(folder: Path, step: int) -> None:
    """Makes the hidden folder that the files of a checkpoint go to, and removes what killed processes left.

    Raises CheckpointError, as all functions here.
    """
    with _told(folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        names.remove_unfinished(folder)
        _aside(folder, step).mkdir()


def write_group(folder: Path, step: int, name: str, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Writes a file of a checkpoint that `prepare` has begun, and returns what its manifest says of it."""
    tensors = {key: piece.tensor for key, piece in pieces.items()}
    parts = {key: (piece.offsets, piece.whole) for key, piece in pieces.items() if not piece.is_whole}
    with _told(folder, step):
        with DurableFile(_aside(folder, step) / name) as file:
            safetensors_file.write(file, tensors, parts)
        return facts_of(file)


def commit(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]
) -> tuple[Path, int]:
    """Makes of written `files`, by name what `write_group` returned, and of `values` the checkpoint of `step`."""
    final, aside = path_of(folder, step), _aside(folder, step)
    with _told(folder, step):
        with DurableFile(aside / names.STATE) as state:
            state.write(json.dumps(values, allow_nan=False).encode())
        listed = {**files, names.STATE: facts_of(state)}
        with DurableFile(aside / names.MANIFEST) as file:
            file.write(to_bytes(step, listed))
        sync_folder(aside)
        _take_name(aside, final)
    return final, sum(facts["bytes"] for facts in listed.values()) + file.num_bytes


def abandon(folder: Path, step: int) -> None:
    """Removes the files of a checkpoint that cannot be finished."""
    shutil.rmtree(_aside(folder, step), ignore_errors=True)


def _aside(folder: Path, step: int) -> Path:
    return folder / f".{path_of(folder, step).name}.part"


@contextmanager
def _told(folder: Path, step: int) -> Iterator[None]:
    """Within it a failing disk is told in words, and an unfinished checkpoint removed."""
    try:
        yield
    except OSError as error:
        abandon(folder, step)
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written to {folder}: {error.strerror or error}.",
            fix=_remedy(folder, error),
        ) from error


def _take_name(aside: Path, final: Path) -> None:
    """Gives the finished folder its name; an older checkpoint of the same step stays readable until then."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        if replaced.exists():
            names.remove(replaced)
        final.rename(replaced)
    aside.rename(final)
    sync_folder(final.parent)
    if replaced.exists():
        names.remove(replaced)


def _remedy(folder: Path, error: OSError) -> str:
    last = next(iter(names.entries(folder)), None)
    kept = f" The last complete checkpoint is {last.path}; --resume goes on from it." if last else ""
    return f"Free space on the disk or lower output.keep_last.{kept}" if _is_full(error) else f"Mend the folder.{kept}"


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
