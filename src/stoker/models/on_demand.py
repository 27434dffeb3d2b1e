"""A native model whose weights stay in its folder and are read, in fp32, when a forward needs them.

A forward takes as long as reading the model from the disk does, and memory for one projection group or one expert: for
a look at what a model computes where the model itself has no room. Embeddings are read row by row, and logits are made
of a range of the vocabulary at a time. There is no backward.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stoker.arch.spec import ArchSpec
from stoker.models.build import on_meta
from stoker.models.quantized import fused_rows
from stoker.models.reader import Reader
from stoker.models.weights import Sources, find_sources
from stoker.nn.decoder import Decoder
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.nn.moe import ExpertLinear, FrozenExpertLinear

VALUES_AT_ONCE = 1 << 22
"""Of a matrix, in fp32 beside what is read of it."""


@dataclass(frozen=True)
class OnDemandModel:
    """A `decoder` that reads its weights as it runs, and its logits; adapters can be put on it as on any other."""

    decoder: Decoder
    _sources: Sources

    @property
    def vocabulary_ranges(self) -> Iterator[tuple[int, int]]:
        """The ranges (start, stop) in which to ask for logits."""
        step = max(1, VALUES_AT_ONCE // self.decoder.hidden_size)
        for start in range(0, self.decoder.vocab_size, step):
            yield start, min(start + step, self.decoder.vocab_size)

    def logits(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Returns the logits [..., stop - start] of tokens `start` to `stop - 1`, of hidden states [..., D]."""
        reader = self._sources.reader
        reader.let_go()
        name = self._sources.names["embedding.weight" if self.decoder.tied_head else "head.weight"][0]
        bias = self.decoder.head_bias
        rows = reader.rows(name, start, stop).float()
        scores = nn.functional.linear(hidden, rows, None if bias is None else bias[start:stop])
        return self.decoder.scaled(scores)


def open_on_demand(folder: Path | str, spec: ArchSpec, stack: ExitStack) -> OnDemandModel:
    """Returns the model of `spec` in `folder`, in evaluation mode, whose files stay open as long as `stack`.

    Weights that are packed in NF4 are dequantised as they are read. Raises ModelError when tensors are missing,
    unexpected or of another shape.
    """
    decoder = on_meta(spec, dtype=torch.float32, kernels="reference")
    sources = find_sources(decoder, spec, folder, stack)
    held = set(sources.names)
    for path, module in list(decoder.named_modules()):
        weight = f"{path}.weight"
        made: nn.Module | None = None
        if isinstance(module, ExpertLinear):
            made = FrozenExpertLinear(module, _Experts(sources, weight, module.num_experts))
        elif isinstance(module, FusedLinear):
            shape = torch.Size((sum(module.out_features), module.in_features))
            made = FrozenLinear(module, _Matrix(sources.reader, sources.names[weight], shape))
        elif module is decoder.embedding:
            made = _Embedding(sources.reader, sources.names[weight][0], decoder.hidden_size)
        elif module is decoder.head:
            made = _Head(decoder.head_bias)
        if made is not None:
            parent, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(parent), name, made)
            held.discard(weight)
    decoder.to_empty(device="cpu")
    for ours in held:
        names, parameter = sources.names[ours], decoder.get_parameter(ours)
        # Not the parameter's own number of rows: norms of heads have one, but are stored head by head, as vectors.
        count = sum(sources.reader.shape(name)[0] for name in names)
        parameter.data.copy_(fused_rows(sources.reader, names, 0, count).view_as(parameter))
    sources.reader.let_go()
    return OnDemandModel(decoder.requires_grad_(False).eval(), sources)


class _Placed(nn.Module):
    """Has the device that layers ask their stored weights for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_device", torch.empty(0), persistent=False)


class _Matrix(_Placed):
    """The frozen weight `[out, in]` of the tensors `names`, one below the other, read for each product."""

    def __init__(self, reader: Reader, names: Sequence[str], shape: torch.Size) -> None:
        super().__init__()
        self._reader, self._names, self.shape = reader, tuple(names), shape

    def matmul(self, x: Tensor) -> Tensor:
        """Returns `x @ W.T`."""
        return torch.cat([x @ rows.to(x.dtype).T for rows in self._pieces()], dim=-1)

    def dequantize(self, *, dtype: torch.dtype) -> Tensor:
        """Returns W."""
        whole, start = torch.empty(self.shape, dtype=dtype), 0
        for rows in self._pieces():
            whole[start : start + rows.shape[0]] = rows
            start += rows.shape[0]
        return whole

    def _pieces(self) -> Iterator[Tensor]:
        """Some rows after others, as the folder holds them."""
        for name in self._names:
            self._reader.let_go()
            if name in self._reader.packed:
                yield self._reader.dense(name)
                continue
            size, step = self._reader.shape(name)[0], max(1, VALUES_AT_ONCE // self.shape[1])
            for start in range(0, size, step):
                yield self._reader.rows(name, start, min(start + step, size))


class _Experts(_Placed):
    """The frozen weights `[E, out, in]` of a mixture's experts, each read when tokens chose it."""

    def __init__(self, sources: Sources, ours: str, num_experts: int) -> None:
        super().__init__()
        self._reader, self._names = sources.reader, sources.names[ours]
        self._is_one = ours not in sources.stacked
        self._num_experts = num_experts

    def one(self, expert: int) -> Tensor:
        """Returns the weight `[out, in]` of one expert, fp32."""
        self._reader.let_go()
        if self._is_one:
            return self._reader.rows(self._names[0], expert, expert + 1)[0].float()
        in_group = len(self._names) // self._num_experts
        names = self._names[expert * in_group : (expert + 1) * in_group]
        return torch.cat([self._reader.dense(name).float() for name in names])


class _Embedding(nn.Module):
    """An embedding of which the rows of the tokens are read."""

    def __init__(self, reader: Reader, name: str, size: int) -> None:
        super().__init__()
        self._reader, self._name, self._size = reader, name, size

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to embeddings [B, T, D], fp32."""
        tokens, place = torch.unique(ids, return_inverse=True)
        rows = [self._reader.rows(self._name, token, token + 1).float() for token in tokens.tolist()]
        self._reader.let_go()
        return torch.cat(rows)[place]


class _Head(nn.Module):
    """The head's bias, if it has one; its weight stays in the folder."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
