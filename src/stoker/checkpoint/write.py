"""Saves a checkpoint so that it is either whole or not there."""

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stoker.checkpoint import folder as names
from stoker.checkpoint import tensors as safetensors_file
from stoker.checkpoint.durable import DurableFile, sync_folder
from stoker.checkpoint.manifest import Manifest
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
    final = names.path_of(folder, step)
    aside = folder / f".{final.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names.remove_unfinished(folder)
        num_bytes = _write_files(aside, step, tensors, values)
        _take_name(aside, final)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written to {folder}: {error.strerror or error}.",
            fix=_remedy(folder, error),
        ) from error
    return final, num_bytes


def _write_files(aside: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> int:
    aside.mkdir()
    manifest = Manifest(step)
    for name, group in tensors.items():
        with DurableFile(aside / f"{name}.safetensors") as file:
            safetensors_file.write(file, group)
        manifest.add(f"{name}.safetensors", file)
    with DurableFile(aside / names.STATE) as file:
        file.write(json.dumps(values, allow_nan=False).encode())
    manifest.add(names.STATE, file)
    with DurableFile(aside / names.MANIFEST) as file:
        file.write(manifest.to_bytes())
    sync_folder(aside)
    return manifest.num_bytes + file.num_bytes


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
