"""Writes a model's folder as Transformers reads it: safetensors, their index when there are several, config.json."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

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
) -> None:
    """Writes `tensors` and `config` into `folder`, which is made if need be; memory holds one shard at a time.

    `read` gives the values of `tensors` that are on the meta device, by name, when they are written.

    Each file is written aside, flushed and renamed; config.json comes last, so a folder that lacks it is incomplete.
    Files of the same name are replaced. Raises OutputError when one cannot be written; no partial file stays.
    """
    folder = Path(folder)
    named = list(tensors)
    shards = _shards(named, max_shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(dict(shard), folder / name, read)
            weight_map |= dict.fromkeys((tensor for tensor, _ in shard), name)
        if len(shards) > 1:
            total = {"total_size": sum(tensor.nbytes for _, tensor in named)}
            _write_json({"metadata": total, "weight_map": weight_map}, folder / "model.safetensors.index.json")
        dtype = str(named[0][1].dtype).removeprefix("torch.")
        kept = {key: value for key, value in config.items() if key != "torch_dtype"}  # the old name of dtype
        _write_json({**kept, "dtype": dtype}, folder / "config.json")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the model cannot be written ({error}).", where=str(folder), fix="Free some space, or name another folder."
        ) from error


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


def _write_shard(tensors: dict[str, Tensor], path: Path, read: Callable[[str], Tensor] | None) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    # Parts of one fused weight share its memory, which safetensors refuses; the copies live for one shard.
    kind = {"device": "cpu", "memory_format": torch.contiguous_format}
    copies = {
        name: torch.empty_like(tensor, **kind).copy_(read(name) if read else tensor) for name, tensor in tensors.items()
    }
    try:
        save_file(copies, partial, metadata={"format": "pt"})
        _publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
