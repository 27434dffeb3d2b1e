"""Writes a model's folder as Transformers reads it: safetensors, their index when there are several, config.json.

Files are written as those of checkpoints are: one tensor after the other, hashed on the way and flushed to the disk.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint import tensors as safetensors_file
from stoker.checkpoint.durable import DurableFile
from stoker.errors import OutputError

DEFAULT_SHARD_BYTES = 5 * 2**30
_PARTIAL = ".partial"


def write(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> dict[Path, str]:
    """Writes `tensors` and `config` into `folder`, which is made if need be; host memory holds one tensor at a time.

    With `read`, `tensors` have shapes and dtypes alone, as those on the meta device: it gives the values by name, of
    each once. Returns the SHA-256 of each file of weights, as it was written.

    Each file is written aside, flushed and renamed; config.json comes last, so a folder that lacks it is incomplete.
    Its `dtype` is that of most of the bytes. Files of the same name are replaced. Raises OutputError when one cannot be
    written; no partial file stays.
    """
    folder = Path(folder)
    named = list(tensors)
    shards = _shards(named, max_shard_bytes)
    hashes = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            hashes[folder / name] = _write_shard(dict(shard), folder / name, read)
            weight_map |= dict.fromkeys((tensor for tensor, _ in shard), name)
        if len(shards) > 1:
            total = {"total_size": sum(tensor.nbytes for _, tensor in named)}
            _write_json({"metadata": total, "weight_map": weight_map}, folder / "model.safetensors.index.json")
        kept = {key: value for key, value in config.items() if key != "torch_dtype"}  # the old name of dtype
        _write_json({**kept, "dtype": _usual_dtype(named)}, folder / "config.json")
    except OSError as error:
        raise OutputError(
            f"the model cannot be written ({error}).", where=str(folder), fix="Free some space, or name another folder."
        ) from error
    return hashes


def num_bytes(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Returns the bytes of all `tensors`, which need not have values."""
    return sum(tensor.nbytes for _, tensor in tensors)


def _usual_dtype(named: Iterable[tuple[str, Tensor]]) -> str:
    """The dtype of most of the bytes of numbers with a point, as config.json names it."""
    counted: Counter[torch.dtype] = Counter()
    for _, tensor in named:
        counted[tensor.dtype] += tensor.nbytes if tensor.dtype.is_floating_point else 0
    return str(counted.most_common(1)[0][0]).removeprefix("torch.")


def _shards(named: Sequence[tuple[str, Tensor]], max_bytes: int) -> list[list[tuple[str, Tensor]]]:
    """Groups of consecutive tensors of at most `max_bytes`, or of one tensor that is larger."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in named:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
    return shards


def _write_shard(tensors: dict[str, Tensor], path: Path, read: Callable[[str], Tensor] | None) -> str:
    """Writes one file and returns its hash."""
    partial = path.with_name(path.name + _PARTIAL)
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        with DurableFile(partial) as file:
            safetensors_file.write(file, tensors, read=read)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return file.sha256


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        _publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    """Flushes `partial` to the disk and gives it its name."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
