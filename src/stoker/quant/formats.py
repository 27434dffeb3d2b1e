"""The formats by name, for callers that hold only a setting."""

from torch import Tensor

from stoker.quant.fp8 import Fp8Weight
from stoker.quant.frozen import FrozenWeight, Scratch
from stoker.quant.int8 import Int8Weight
from stoker.quant.nf4 import NF4Weight

FORMATS = ("nf4", "int8", "fp8")


def quantize(
    weight: Tensor,
    kind: str,
    *,
    part_rows: tuple[int, ...] | None = None,
    scratch: Scratch | None = None,
    implementation: str = "reference",
) -> FrozenWeight:
    """Returns `weight` `[out, in]` in the frozen format `kind`, one of FORMATS, on its own device.

    `part_rows` are the rows of the Hugging Face weights that make up a fused one: NF4 quantises each as if alone (rows
    are independent in the other formats). Raises ValueError for an unknown kind.
    """
    if kind == "nf4":
        return NF4Weight.quantize(weight, part_rows=part_rows, scratch=scratch, implementation=implementation)
    if kind == "int8":
        return Int8Weight.quantize(weight, scratch=scratch)
    if kind == "fp8":
        return Fp8Weight.quantize(weight, scratch=scratch, implementation=implementation)
    raise ValueError(f"quantization = {kind!r}; allowed: {', '.join(FORMATS)}")
