"""Streams the weights of a Hugging Face folder into a `Decoder`, tensor by tensor."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError, Problem
from stoker.models.folder import weight_files
from stoker.models.probe import Probe
from stoker.models.quantized import Quantizer
from stoker.models.reader import Reader
from stoker.nn.decoder import Decoder
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear

_MAX_PROBLEMS = 12
_HEAD = "lm_head.weight"


def stream_into(
    decoder: Decoder,
    spec: ArchSpec,
    folder: Path | str,
    *,
    device: torch.device | str,
    quantization: str = "none",
    kernels: str = "reference",
) -> None:
    """Gives `decoder`, built on the meta device, memory on `device` and the weights of `folder`, cast to its dtypes.

    With `quantization` the weights of the blocks' linear layers are quantised on `device`, each as soon as it is read:
    of what is read, memory holds one fused weight at a time. In a folder with weights in NF4 those that are stored in
    full stay so, and with "fp8" those whose output it would move too far (`quant.fp8.MAX_RELATIVE_ERROR`). Raises
    ModelError, before any memory is taken, when tensors are missing, unexpected or of another shape.
    """
    with ExitStack() as stack:
        reader = Reader(weight_files(folder), stack)
        sources = _sources(spec, reader)
        _check_shapes(decoder, sources, reader)
        frozen = _to_quantize(decoder, sources, reader) if quantization != "none" else {}
        for layer in frozen.values():  # takes no memory on the device
            layer.weight = nn.Parameter(layer.weight.new_empty(0, layer.in_features), requires_grad=False)
        decoder.to_empty(device=device)
        quantizer = Quantizer(quantization, reader, device=device, kernels=kernels)
        probe = Probe(spec, lambda norm: reader.dense(sources[norm][0]))
        for ours, names in sources.items():
            if ours in frozen:
                path = ours.removesuffix(".weight")
                parent, _, name = path.rpartition(".")
                matrix = quantizer.matrix(names, layer=path, probe=probe)
                if isinstance(matrix, torch.Tensor):
                    weight = matrix.to(frozen[ours].weight.dtype)
                    frozen[ours].weight = nn.Parameter(weight, requires_grad=False)
                else:
                    setattr(decoder.get_submodule(parent), name, FrozenLinear(frozen[ours], matrix))
                continue
            rows = decoder.get_parameter(ours).detach()
            start = 0
            for name in names:
                tensor = reader.dense(name)
                rows[start : start + tensor.shape[0]] = tensor
                start += tensor.shape[0]


def _to_quantize(decoder: Decoder, sources: dict[str, tuple[str, ...]], reader: Reader) -> dict[str, FusedLinear]:
    """The layers whose weight will be kept in a frozen format, by the weight's name."""
    found = {}
    for ours, names in sources.items():
        layer = decoder.get_submodule(ours.rpartition(".")[0])
        is_stored_so = not reader.packed or reader.packed.issuperset(names)
        if isinstance(layer, FusedLinear) and ours.endswith(".weight") and is_stored_so:
            found[ours] = layer
    return found


def _sources(spec: ArchSpec, reader: Reader) -> dict[str, tuple[str, ...]]:
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


def _tied_source(embedding: str, reader: Reader) -> str:
    """A tied model may store its one matrix under either name or both; two different ones contradict config.json."""
    if embedding not in reader.names:
        return _HEAD
    if not torch.equal(reader.dense(embedding), reader.dense(_HEAD)):
        raise ModelError(
            f"config.json ties the head to the embedding, but {_HEAD} differs from {embedding}.",
            where=str(reader.folder),
            fix='If the head is meant to be its own, set "tie_word_embeddings": false in config.json.',
        )
    return embedding


def _check_shapes(decoder: Decoder, sources: dict[str, tuple[str, ...]], reader: Reader) -> None:
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
