"""Streams the weights of a Hugging Face folder into a `Decoder`, tensor by tensor."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError, Problem
from stoker.models.folder import WeightIndex, weight_files
from stoker.nn.decoder import Decoder
from stoker.nn.linear import FusedLinear

_MAX_PROBLEMS = 12
_HEAD = "lm_head.weight"


def stream_into(decoder: Decoder, spec: ArchSpec, folder: Path | str, *, device: torch.device | str) -> None:
    """Gives `decoder`, built on the meta device, memory on `device` and the weights of `folder`, cast to its dtypes.

    Raises ModelError, before any memory is taken, when tensors are missing, unexpected or of another shape.
    """
    with ExitStack() as stack:
        reader = _Reader(weight_files(folder), stack)
        sources = _sources(spec, reader)
        _check_shapes(decoder, sources, reader)
        decoder.to_empty(device=device)
        for ours, names in sources.items():
            rows = decoder.get_parameter(ours).detach()
            start = 0
            for name in names:
                tensor = reader.tensor(name)
                rows[start : start + tensor.shape[0]] = tensor
                start += tensor.shape[0]


class _Reader:
    """Tensors of a folder by name; files are opened when first asked for and closed with `stack`."""

    def __init__(self, index: WeightIndex, stack: ExitStack) -> None:
        self.folder = index.folder
        # Old checkpoints hold the rotary frequencies, which follow from config.json.
        self.names = {name for name in index.files if not name.endswith("rotary_emb.inv_freq")}
        self._paths = index.files
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)

    def _file(self, name: str) -> Any:
        path = self._paths[name]
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path]


def _sources(spec: ArchSpec, reader: _Reader) -> dict[str, tuple[str, ...]]:
    """Our parameter names and the tensors to read for each; raises ModelError for missing and unexpected ones."""
    sources = {entry.ours: entry.theirs for entry in weight_map(spec)}
    present = set(reader.names)
    if spec.tied_head and _HEAD in present:
        sources["embedding.weight"] = (_tied_source(sources["embedding.weight"][0], reader),)
        present -= {_HEAD} - set(sources["embedding.weight"])
    expected = {name for names in sources.values() for name in names}
    problems = [(name, "is missing") for name in sorted(expected - present)]
    problems += [(name, "is not part of this architecture") for name in sorted(present - expected)]
    _refuse(problems, reader.folder)
    return sources


def _tied_source(embedding: str, reader: _Reader) -> str:
    """A tied model may store its one matrix under either name or both; two different ones contradict config.json."""
    if embedding not in reader.names:
        return _HEAD
    if not torch.equal(reader.tensor(embedding), reader.tensor(_HEAD)):
        raise ModelError(
            f"config.json ties the head to the embedding, but {_HEAD} differs from {embedding}.",
            where=str(reader.folder),
            fix='If the head is meant to be its own, set "tie_word_embeddings": false in config.json.',
        )
    return embedding


def _check_shapes(decoder: Decoder, sources: dict[str, tuple[str, ...]], reader: _Reader) -> None:
    problems = []
    for ours, names in sources.items():
        owner = decoder.get_submodule(ours.rpartition(".")[0])
        parameter = decoder.get_parameter(ours)
        sizes = owner.out_features if isinstance(owner, FusedLinear) else (parameter.shape[0],)
        for name, size in zip(names, sizes, strict=True):
            shape, wanted = reader.shape(name), (size, *parameter.shape[1:])
            if shape != wanted:
                problems.append((name, f"has shape {list(shape)}, but config.json makes it {list(wanted)}"))
    _refuse(problems, reader.folder)


def _refuse(problems: Sequence[tuple[str, str]], folder: Path) -> None:
    """Raises one ModelError for all problems (tensor name, what is wrong), if there are any."""
    if not problems:
        return
    listed = [Problem(f"tensor {name} {what}.", str(folder)) for name, what in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        listed.append(Problem(f"{len(problems) - _MAX_PROBLEMS} tensors more are wrong.", str(folder)))
    listed.append(Problem("The weights do not fit config.json.", fix="Fetch the model again, or mend its config.json."))
    raise ModelError(listed)
