"""`ArchSpec` to `nn.Decoder`: built on the meta device, filled at random or from a folder, and written back to one."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec, WeightEntry
from stoker.models import weights, writer
from stoker.models.build import on_meta
from stoker.nn.decoder import Decoder
from stoker.nn.linear import FusedLinear
from stoker.nn.moe import interleave


def build(
    spec: ArchSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    initializer_range: float = 0.02,
    kernels: str = "reference",
) -> Decoder:
    """A `Decoder` with random weights: norms one, biases zero, the rest normal with `initializer_range`.

    A module with `reset_parameters` sets those of its own. Drawn in fp32 on the CPU from their own generator, so that a
    seed gives the same weights on every device.
    """
    decoder = on_meta(spec, dtype=dtype, kernels=kernels).to_empty(device=device)
    fill(decoder, generator=torch.Generator().manual_seed(seed), initializer_range=initializer_range)
    return decoder


def fill(decoder: Decoder, *, generator: torch.Generator, initializer_range: float) -> None:
    """Gives a decoder the random weights that `build` describes, drawn where `generator` is."""
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                continue
            if name.endswith(".bias"):
                parameter.zero_()
            elif generator.device.type == parameter.device.type != "cpu":
                parameter.normal_(0.0, initializer_range, generator=generator)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, initializer_range, generator=generator))
        for module in decoder.modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Embedding) and hasattr(module, "reset_parameters"):
                cast("Callable[[], None]", module.reset_parameters)()


def load(
    folder: Path | str,
    spec: ArchSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "reference",
    quantization: str = "none",
) -> Decoder:
    """A `Decoder` with the weights of a Hugging Face folder; beyond the model, memory holds one weight at a time.

    With `quantization` ("nf4", "int8", "fp8") the linear layers of the blocks become `FrozenLinear`s, quantised one by
    one as they are read; the rest has `dtype`. A folder that bitsandbytes wrote in NF4 is read as it is with "nf4", and
    dequantised to `dtype` with "none". With "fp8", layers whose output it would move too far keep `dtype`.

    Raises ModelError, naming the tensors, when some are missing, unexpected or of another shape.
    """
    decoder = on_meta(spec, dtype=dtype, kernels=kernels)
    weights.stream_into(decoder, spec, folder, device=device, quantization=quantization, kernels=kernels)
    return decoder


def hf_tensors(decoder: Decoder, spec: ArchSpec) -> Iterator[tuple[str, Tensor]]:
    """Each Hugging Face tensor's name and its values among our parameters, as detached views."""
    for entry in weight_map(spec):
        module_name, _, kind = entry.ours.rpartition(".")
        module = decoder.get_submodule(module_name)
        yield from entry_tensors(decoder, entry, getattr(module, kind).detach())  # if quantised, dequantised


def entry_tensors(decoder: Decoder, entry: WeightEntry, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors, by name, of one parameter of `decoder`, as views of its value `parameter`."""
    names = entry.stored or entry.theirs
    for name, rows in zip(names, split(parameter, entry, part_sizes(decoder, entry)), strict=True):
        yield name, as_stored(rows, entry)


def part_sizes(decoder: Decoder, entry: WeightEntry) -> tuple[int, ...] | None:
    """The rows of each Hugging Face tensor of an entry; None: all have the same number."""
    module = decoder.get_submodule(entry.ours.rpartition(".")[0])
    return module.out_features if isinstance(module, FusedLinear) else None


def as_stored(rows: Tensor, entry: WeightEntry) -> Tensor:
    """The values of one Hugging Face tensor as files hold them, from its rows of our parameter."""
    values = interleave(rows) if entry.interleaved else rows
    return values.transpose(-1, -2) if entry.transposed and values.dim() > 1 else values


def split(parameter: Tensor, entry: WeightEntry, sizes: tuple[int, ...] | None) -> list[Tensor]:
    """The parameter as the Hugging Face tensors of `entry`; `sizes`: as `part_sizes` gives them."""
    if not entry.stacked:
        count = len(entry.theirs)
        return list(parameter.split(sizes)) if sizes else list(parameter.chunk(count)) if count > 1 else [parameter]
    in_group = len(entry.theirs) // parameter.shape[0]
    return [rows for one in parameter for rows in (one.chunk(in_group) if in_group > 1 else [one])]


def save(
    decoder: Decoder,
    spec: ArchSpec,
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    max_shard_bytes: int = writer.DEFAULT_SHARD_BYTES,
) -> None:
    """Writes `decoder` as a folder that Transformers loads: weights, and `config` with the weights' dtype.

    Raises OutputError when it cannot be written.
    """
    writer.write(hf_tensors(decoder, spec), folder, config=config, max_shard_bytes=max_shard_bytes)
