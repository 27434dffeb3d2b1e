"""Streams the weights of a Hugging Face folder into a `Decoder`, tensor by tensor."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError
from stoker.models import weight_names
from stoker.models.folder import weight_files
from stoker.models.probe import Probe
from stoker.models.quantized import Quantizer
from stoker.models.reader import Reader
from stoker.nn.decoder import Decoder
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.nn.moe import ExpertLinear, FrozenExpertLinear
from stoker.quant.experts import NF4Experts

_VALUES_AT_ONCE = 1 << 22


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
        found = find_sources(decoder, spec, folder, stack)
        reader, sources, stacked = found.reader, found.names, found.stacked
        frozen = to_quantize(decoder, found, quantization)
        for layer in frozen.values():  # takes no memory on the device
            layer.weight = nn.Parameter(layer.weight.new_empty(0, layer.in_features), requires_grad=False)
        decoder.to_empty(device=device)
        quantizer = Quantizer(quantization, reader, device=device, kernels=kernels)
        probe = Probe(spec, lambda norm: reader.dense(sources[norm][0]) if norm in sources else None)
        for ours, names in sources.items():
            if ours in frozen:
                path = ours.removesuffix(".weight")
                parent, _, name = path.rpartition(".")
                held = frozen[ours]
                if isinstance(held, ExpertLinear):
                    stored = NF4Experts(quantizer.experts(names), held.num_experts)
                    setattr(decoder.get_submodule(parent), name, FrozenExpertLinear(held, stored))
                    continue
                matrix = quantizer.matrix(names, layer=path, probe=probe)
                if isinstance(matrix, torch.Tensor):
                    weight = matrix.to(held.weight.dtype)
                    held.weight = nn.Parameter(weight, requires_grad=False)
                else:
                    setattr(decoder.get_submodule(parent), name, FrozenLinear(held, matrix))
                continue
            parameter = decoder.get_parameter(ours).detach()
            for rows, held in _rows(parameter, names, stacked=ours in stacked):
                start = 0
                for name in held:
                    tensor = reader.dense(name)
                    rows[start : start + tensor.shape[0]] = tensor
                    start += tensor.shape[0]


@dataclass(frozen=True)
class Sources:
    """Where the weights of a decoder lie: `names` of the tensors to read for each parameter, by our name of it.

    Those of `stacked` parameters are of one expert after the other.
    """

    reader: Reader
    names: Mapping[str, tuple[str, ...]]
    stacked: Set[str]


def find_sources(decoder: Decoder, spec: ArchSpec, folder: Path | str, stack: ExitStack) -> Sources:
    """Returns where the weights of `decoder` lie in `folder`, whose files stay open as long as `stack`.

    Raises ModelError when tensors are missing, unexpected or of another shape.
    """
    reader = Reader(weight_files(folder), stack)
    stacked = {entry.ours for entry in weight_map(spec) if entry.stacked}
    names = _sources(spec, reader)
    _check_shapes(decoder, names, reader, stacked)
    return Sources(reader, names, stacked)


def _rows(parameter: Tensor, names: Sequence[str], *, stacked: bool) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """The parameter's memory and the tensors that lie there one below the other: once, or for each expert."""
    if not stacked:
        yield parameter, names
        return
    in_group = len(names) // parameter.shape[0]
    for index, rows in enumerate(parameter):
        yield rows, names[index * in_group : (index + 1) * in_group]


def to_quantize(decoder: Decoder, sources: Sources, kind: str) -> dict[str, FusedLinear | ExpertLinear]:
    """Returns the layers whose weight will be kept in the frozen format `kind` ("none": no layer), by the weight's
    name; of experts, in NF4 alone."""
    if kind == "none":
        return {}
    kinds = FusedLinear | ExpertLinear if kind == "nf4" else FusedLinear
    found, reader = {}, sources.reader
    for ours, names in sources.names.items():
        layer = decoder.get_submodule(ours.rpartition(".")[0])
        is_stored_so = not reader.packed or reader.packed.issuperset(names)
        if isinstance(layer, kinds) and ours.endswith(".weight") and is_stored_so:
            found[ours] = layer
    return found


def _sources(spec: ArchSpec, reader: Reader) -> dict[str, tuple[str, ...]]:
    """Our parameter names and the tensors to read for each; raises ModelError for missing and unexpected ones."""
    found = weight_names.find(
        spec, reader.names, alias_of=lambda embedding, alias: _same_source(embedding, alias, reader)
    )
    _refuse(found.problems, reader.folder)
    reader.transposed |= found.transposed - reader.packed
    reader.interleaved |= found.interleaved
    return dict(found.sources)


def _same_source(embedding: str, alias: str, reader: Reader) -> str:
    """A tied model may store its one matrix under either name or both; two different ones contradict config.json."""
    if embedding not in reader.names:
        return alias
    if not _equal(embedding, alias, reader):
        raise ModelError(
            f"config.json ties the head to the embedding, but {alias} differs from {embedding}.",
            where=str(reader.folder),
            fix='If the head is meant to be its own, set "tie_word_embeddings": false in config.json.',
        )
    return embedding


def _equal(first: str, second: str, reader: Reader) -> bool:
    """Whether two tensors are the same, read in pieces: they may be the largest of the model."""
    shape = reader.shape(first)
    if shape != reader.shape(second):
        return False
    rows = max(1, _VALUES_AT_ONCE // max(1, shape[-1]))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        if not torch.equal(reader.rows(first, start, stop), reader.rows(second, start, stop)):
            return False
        reader.let_go()
    return True


def _check_shapes(decoder: Decoder, sources: dict[str, tuple[str, ...]], reader: Reader, stacked: Set[str]) -> None:
    problems = []
    for ours, names in sources.items():
        owner = decoder.get_submodule(ours.rpartition(".")[0])
        shape = decoder.get_parameter(ours).shape
        held = list(names)
        if ours in stacked:
            if len(held) % shape[0]:
                problems.append((held[0], f"is one of {len(held)}, but config.json makes {shape[0]} groups of them"))
                continue
            held, shape = held[: len(held) // shape[0]], shape[1:]
        sizes = owner.out_features if isinstance(owner, FusedLinear) else (shape[0] // len(held),) * len(held)
        for index, name in enumerate(names):
            found, wanted = reader.shape(name), (sizes[index % len(sizes)], *shape[1:])
            if found != wanted:
                problems.append((name, f"has shape {list(found)}, but config.json makes it {list(wanted)}"))
    _refuse(problems, reader.folder)


def _refuse(problems: Sequence[tuple[str, str]], folder: Path) -> None:
    """Raises one ModelError for all problems (tensor name, what is wrong), if there are any."""
    if problems:
        raise ModelError(weight_names.listed(problems, folder))
