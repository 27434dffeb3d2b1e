"""Hugging Face's tensors of a native model one by one: which rows of our parameters each is, and how files hold it.

What reads, changes and writes a model in this grain never holds more of it than one tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec, WeightEntry
from stoker.models.native import as_stored, part_sizes, split
from stoker.nn.decoder import Decoder


@dataclass(frozen=True)
class Part:
    """One tensor of a model's files, called `name` in those that are written.

    It is the tensor `index` of `entry`: `rows` of our parameter or, with an `expert`, of that expert's matrix in it.
    `like` has its shape in files, and the dtype of our parameter, but no values.
    """

    name: str
    entry: WeightEntry
    index: int
    expert: int | None
    rows: slice
    like: Tensor

    def as_stored(self, values: Tensor) -> Tensor:
        """Returns its rows as files hold them: some store them transposed, or gate's and up's in turn."""
        return as_stored(values, self.entry)


def parts(decoder: Decoder, spec: ArchSpec) -> Iterator[Part]:
    """Yields the tensors of a `decoder` without adapters, on the meta device or elsewhere, in the order of files."""
    for entry in weight_map(spec):
        parameter = decoder.get_parameter(entry.ours).detach().to("meta")
        pieces = split(parameter, entry, part_sizes(decoder, entry))
        in_group = len(pieces) // parameter.shape[0] if entry.stacked else len(pieces)
        start = 0
        for index, (name, piece) in enumerate(zip(entry.stored or entry.theirs, pieces, strict=True)):
            expert = index // in_group if entry.stacked else None
            if index % in_group == 0:
                start = 0
            size = piece.shape[0] if piece.dim() else 1
            yield Part(name, entry, index, expert, slice(start, start + size), as_stored(piece, entry))
            start += size
