"""The tensors of a native model that a checkpoint holds, one at a time, by however many processes it was written."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from stoker.arch.spec import ArchSpec
from stoker.checkpoint.stored import StoredTensors
from stoker.models.build import on_meta
from stoker.models.parts import Part, parts
from stoker.models.reader import Reader
from stoker.models.weights import find_sources

_TASK = "model."
"""Checkpoints name parameters as the task that is trained does."""


class TrainedTensors:
    """The model of `spec` with `weights` of a checkpoint, the others as `base` has them; files stay open with `stack`.

    `base_spec` is that of the folder `base`: the vocabulary of a trained model may have grown. `dtype`: of all tensors
    but those that are kept in fp32; None: each has the one that it was trained in, or has in the base. Raises
    ModelError when the base lacks a tensor that was not trained.
    """

    def __init__(
        self,
        weights: StoredTensors,
        spec: ArchSpec,
        *,
        base: Path,
        base_spec: ArchSpec,
        stack: ExitStack,
        dtype: torch.dtype | None = None,
    ) -> None:
        decoder = on_meta(spec, dtype=dtype or torch.float32, kernels="reference")
        self._weights = weights
        self._parts = {part.name: part for part in parts(decoder, spec)}
        are_all_trained = all(_held(part) in weights for part in self._parts.values())
        self._sources = None
        if not are_all_trained:
            original = on_meta(base_spec, dtype=torch.float32, kernels="reference")
            self._sources = find_sources(original, base_spec, base, stack)
        self._dtypes = {name: part.like.dtype if dtype else self._own_dtype(part) for name, part in self._parts.items()}

    def shapes(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name of each tensor with one on the meta device that has its shape and dtype."""
        for name, part in self._parts.items():
            yield name, torch.empty(part.like.shape, dtype=self._dtypes[name], device="meta")

    def read(self, name: str) -> Tensor:
        """Returns a tensor as files hold it."""
        part = self._parts[name]
        return part.as_stored(self._values(part)).to(self._dtypes[name])

    def _values(self, part: Part) -> Tensor:
        held = _held(part)
        if held not in self._weights:
            reader, source = self._of_base(part)
            reader.let_go()
            return reader.dense(source)
        if part.expert is not None:
            return self._weights.rows(held, part.expert, part.expert + 1)[0][part.rows]
        if len(part.entry.theirs) == 1:
            return self._weights[held]
        return self._weights.rows(held, part.rows.start, part.rows.stop)

    def _own_dtype(self, part: Part) -> torch.dtype:
        held = _held(part)
        if held not in self._weights:
            reader, source = self._of_base(part)
            return reader.dtype(source)
        return self._weights.dtype(held)

    def _of_base(self, part: Part) -> tuple[Reader, str]:
        assert self._sources is not None
        return self._sources.reader, self._sources.names[part.entry.ours][part.index]


def _held(part: Part) -> str:
    return _TASK + part.entry.ours
