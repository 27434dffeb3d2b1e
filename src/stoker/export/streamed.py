"""Writes a model whose tensors are made one at a time into a folder that appears whole, and reads its files again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from stoker.checkpoint.durable import sha256_of
from stoker.errors import StokerError
from stoker.export.new_folder import new_folder
from stoker.models import writer

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and how much there is."""


def no_progress(what: str, done: int, total: int) -> None:
    """Tells nobody."""
    del what, done, total


class Tensors(Protocol):
    """A model's tensors by the names that they have in its files."""

    def shapes(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name of each tensor with one on the meta device that has its shape and dtype."""
        ...

    def read(self, name: str) -> Tensor:
        """Returns a tensor's values as files hold them."""
        ...


@contextmanager
def written(
    tensors: Tensors,
    out: Path,
    *,
    config: Mapping[str, Any],
    max_shard_bytes: int = writer.DEFAULT_SHARD_BYTES,
    progress: Progress = no_progress,
) -> Iterator[Path]:
    """Within it there is a hidden folder with the model in Transformers' format, which becomes `out` at the end.

    Memory holds one tensor. `config` lacks nothing but the dtype. Raises OutputError as `new_folder` does, and
    StokerError when the files, read again, do not hold what was written.
    """
    shapes = list(tensors.shapes())
    total, done = writer.num_bytes(shapes), 0

    def read(name: str) -> Tensor:
        nonlocal done
        values = tensors.read(name)
        done += values.nbytes
        progress("writing", done, total)
        return values

    with new_folder(out, needed_bytes=total) as aside:
        hashes = writer.write(shapes, aside, config=config, max_shard_bytes=max_shard_bytes, read=read)
        _require_bytes(hashes, out, progress)
        yield aside


def _require_bytes(hashes: Mapping[Path, str], out: Path, progress: Progress) -> None:
    total, done = sum(path.stat().st_size for path in hashes), 0
    for path, expected in hashes.items():
        progress("reading again", done, total)
        if sha256_of(path) != expected:
            raise StokerError(
                f"what was written is not what was made: {path.name} read again is another. Nothing was kept.",
                where=str(out),
                fix="Check that the disk is sound.",
            )
        done += path.stat().st_size
    progress("reading again", total, total)
