"""NF4 weights with double quantisation, value for value those of bitsandbytes, in its checkpoint layout.

Sources: QLoRA (arXiv:2305.14314) for the format; 8-bit optimisers (arXiv:2110.02861) for the dynamic code of the nested
scales; bitsandbytes 0.50 for the order of the floating-point operations, which decides the last bits.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from stoker.errors import ModelError
from stoker.kernels import nf4 as kernel
from stoker.quant.frozen import DequantizedProducts, Scratch

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
# Values quantised at a time: bounds the float32 and index copies to about 200 MB. A multiple of every block size.
CHUNK_VALUES = 1 << 24
STATE_KEY = "quant_state.bitsandbytes__nf4"


@lru_cache(maxsize=1)
def dynamic_code() -> Tensor:
    """Returns the 256 values of the signed dynamic 8-bit code, ascending: seven decades, each cut ever finer."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (decade - 6) * middles).tolist() + (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_values(values: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Flat values to (packed uint8, absmax float32); full blocks multiply by a reciprocal, a last short one divides."""
    values = values.float()
    num_full = values.numel() // block_size * block_size
    blocks = values[:num_full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=-1)
    scaled = torch.clamp(blocks * (1.0 / absmax.clamp(min=1e-38))[:, None], -1, 1).flatten()
    if num_full < values.numel():
        rest = values[num_full:]
        rest_absmax = rest.abs().max().clamp(min=1e-38)
        absmax = torch.cat((absmax, rest_absmax[None]))
        scaled = torch.cat((scaled, torch.clamp(rest / rest_absmax, -1, 1)))
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    code = torch.tensor(kernel.NF4_CODE, device=values.device)
    bounds = (code[:-1] + code[1:]) / 2
    index = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return (index[::2] << 4) | index[1::2], absmax


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest of 256 ascending codes, by the binary search of bitsandbytes' CUDA kernel.

    Its last step decides what a tie becomes. (Its CPU build looks the index up in a table of 65,536 entries instead,
    and so picks the other neighbour for values within 2^-16 of a midpoint.)
    """
    lower, pivot = torch.zeros_like(values, dtype=torch.int64), torch.full_like(values, 127, dtype=torch.int64)
    upper = torch.full_like(pivot, 255)
    for stride in (64, 32, 16, 8, 4, 2, 1):
        above = values > code[pivot]
        lower, upper = torch.where(above, pivot, lower), torch.where(above, upper, pivot)
        pivot = torch.where(above, pivot + stride, pivot - stride)
    take_upper = (values > code[pivot]) & (values > (code[upper] + code[pivot]) * 0.5)
    take_lower = (values <= code[pivot]) & (values < (code[lower] + code[pivot]) * 0.5)
    return torch.where(take_upper, upper, torch.where(take_lower, lower, pivot))


def _quantize_nested(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Centred block scales to (uint8 codes, float32 absmax of each nested block)."""
    padded = torch.nn.functional.pad(absmax, (0, -absmax.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = padded.abs().amax(dim=-1)
    scaled = padded * (1.0 / nested_absmax.clamp(min=1e-38))[:, None]
    # A nested block of zeros gets index 0, as in bitsandbytes (any index times an absmax of 0 is the same scale).
    index = _nearest(scaled.flatten(), dynamic_code().to(absmax.device)).view_as(padded) * (nested_absmax > 0)[:, None]
    return index.flatten()[: absmax.numel()].to(torch.uint8), nested_absmax


@dataclass(frozen=True)
class _Part:
    """The stored form of one Hugging Face weight `[rows, in]`."""

    rows: int
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: float


def _quantize_part(weight: Tensor, *, double: bool) -> _Part:
    pieces = [_quantize_values(values, block_size=BLOCK_SIZE) for values in weight.flatten().split(CHUNK_VALUES)]
    packed, absmax = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    if not double:
        return _Part(weight.shape[0], packed, absmax, None, 0.0)
    offset = absmax.mean()
    index, nested_absmax = _quantize_nested(absmax - offset)
    return _Part(weight.shape[0], packed, index, nested_absmax, offset.item())


class NF4Weight(DequantizedProducts):
    """A frozen weight `[out, in]` in NF4: 4.13 bits a value with double quantisation, 4.5 without.

    The rows may belong to several Hugging Face weights (`part_rows`), each quantised as if alone, so that a fused group
    holds exactly what bitsandbytes would and can be read from and written to its checkpoints. `implementation` names
    the kernel ("reference" or "triton"); `scratch`, shared by many weights, is where products dequantise.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        parts: Iterable[_Part],
        in_features: int,
        *,
        source_dtype: torch.dtype,
        block_size: int = BLOCK_SIZE,
        scratch: Scratch | None = None,
        implementation: str = "reference",
    ) -> None:
        super().__init__()
        parts = tuple(parts)
        self.part_rows = tuple(part.rows for part in parts)
        self.shape = torch.Size((sum(self.part_rows), in_features))
        self.source_dtype = source_dtype
        self.block_size = block_size
        self.scratch = scratch
        self.implementation = implementation
        device = parts[0].packed.device
        self.register_buffer("packed", torch.cat([part.packed for part in parts]))
        self.register_buffer("absmax", torch.cat([part.absmax for part in parts]))
        self.register_buffer("code", torch.tensor(kernel.NF4_CODE, device=device))
        nested = [part.nested_absmax for part in parts if part.nested_absmax is not None]
        offsets = [torch.full_like(scale, part.nested_offset) for scale, part in zip(nested, parts, strict=False)]
        self.register_buffer("nested_absmax", torch.cat(nested) if nested else None)
        self.register_buffer("nested_offset", torch.cat(offsets) if nested else None)
        self.register_buffer("nested_code", dynamic_code().to(device, copy=True) if nested else None)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        part_rows: tuple[int, ...] | None = None,
        double: bool = True,
        scratch: Scratch | None = None,
        implementation: str = "reference",
    ) -> "NF4Weight":
        """Returns `weight` `[out, in]` quantised on its own device; `part_rows` (all rows if None) sum to `out`."""
        parts = weight.detach().split(part_rows or (weight.shape[0],))
        quantized = [_quantize_part(part, double=double) for part in parts]
        return cls(
            quantized, weight.shape[1], source_dtype=weight.dtype, scratch=scratch, implementation=implementation
        )

    @classmethod
    def on_meta(
        cls,
        part_rows: tuple[int, ...],
        in_features: int,
        *,
        source_dtype: torch.dtype,
        scratch: Scratch | None = None,
        implementation: str = "reference",
    ) -> "NF4Weight":
        """Returns what `quantize` makes of a weight with such parts, doubly quantised, but without memory."""
        parts = []
        for rows in part_rows:
            blocks = -(-rows * in_features // BLOCK_SIZE)
            sizes = (rows * in_features + 1) // 2, blocks
            packed, absmax = (torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes)
            groups = -(-blocks // NESTED_BLOCK_SIZE)
            parts.append(_Part(rows, packed, absmax, torch.empty(groups, device="meta"), 0.0))
        return cls(parts, in_features, source_dtype=source_dtype, scratch=scratch, implementation=implementation)

    def _spans(self) -> list[tuple[int, int, int, int, int]]:
        """For each part: first row, rows, and where its packed bytes, scales and nested scales begin."""
        spans, row, byte, block, group = [], 0, 0, 0, 0
        for rows in self.part_rows:
            spans.append((row, rows, byte, block, group))
            values = rows * self.shape[1]
            blocks = -(-values // self.block_size)
            row, byte, block = row + rows, byte + (values + 1) // 2, block + blocks
            group += -(-blocks // NESTED_BLOCK_SIZE)
        return spans

    def _is_seamless(self) -> bool:
        """Whether no part but the last ends inside a (nested) block, so that all parts are one run of blocks."""
        unit = self.block_size * (1 if self.nested_absmax is None else NESTED_BLOCK_SIZE)
        return all(rows * self.shape[1] % unit == 0 for rows in self.part_rows[:-1])

    def _tensors(self, byte: int, block: int, group: int, *, num_values: int) -> kernel.NF4Tensors:
        packed, absmax = self.packed[byte : byte + (num_values + 1) // 2], self.absmax[block:]
        if self.nested_absmax is None or self.nested_offset is None:
            return kernel.NF4Tensors(packed, absmax, self.code, None, None, None, self.block_size)
        nested_absmax, nested_offset = self.nested_absmax[group:], self.nested_offset[group:]
        return kernel.NF4Tensors(
            packed,
            absmax,
            self.code,
            self.nested_code,
            nested_absmax,
            nested_offset,
            self.block_size,
            NESTED_BLOCK_SIZE,
        )

    def dequantize(self, out: Tensor | None = None, *, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        """Returns the weight in `dtype` `[out, in]`, in `out` when given (whose dtype then counts).

        `ends`: of experts' weights one below the other, those without rows may be left out (`kernels.nf4.dequantize`).
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        is_seamless = self._is_seamless()
        spans = [(0, self.shape[0], 0, 0, 0)] if is_seamless else self._spans()
        for row, rows, byte, block, group in spans:
            tensors = self._tensors(byte, block, group, num_values=rows * self.shape[1])
            kernel.dequantize(
                tensors,
                out[row : row + rows],
                ends=ends if is_seamless else None,
                implementation=self.implementation,
            )
        return out

    def extra_repr(self) -> str:
        """Shows shape, parts and kernel."""
        return f"{tuple(self.shape)}, parts={self.part_rows}, implementation={self.implementation}"


def to_checkpoint(weight: NF4Weight, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns what bitsandbytes would save for the modules `names` (one a part): `NAME.weight` and its state."""
    tensors: dict[str, Tensor] = {}
    for name, (_, rows, byte, block, group) in zip(names, weight._spans(), strict=True):
        values = rows * weight.shape[1]
        blocks = -(-values // weight.block_size)
        state = {
            "quant_type": "nf4",
            "blocksize": weight.block_size,
            "dtype": str(weight.source_dtype).removeprefix("torch."),
            "shape": [rows, weight.shape[1]],
        }
        key = f"{name}.weight"
        tensors[key] = weight.packed[byte : byte + (values + 1) // 2].clone()[:, None]
        tensors[f"{key}.absmax"] = weight.absmax[block : block + blocks].clone()
        tensors[f"{key}.quant_map"] = weight.code.clone()
        if weight.nested_absmax is not None and weight.nested_offset is not None:
            groups = -(-blocks // NESTED_BLOCK_SIZE)
            tensors[f"{key}.nested_absmax"] = weight.nested_absmax[group : group + groups].clone()
            tensors[f"{key}.nested_quant_map"] = dynamic_code().to(weight.packed.device, copy=True)
            state |= {
                "nested_blocksize": NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": weight.nested_offset[group].item(),
            }
        tensors[f"{key}.{STATE_KEY}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def _read_part(tensors: Mapping[str, Tensor], name: str) -> tuple[_Part, dict]:
    key = f"{name}.weight"
    missing = [suffix for suffix in ("", ".absmax", f".{STATE_KEY}") if key + suffix not in tensors]
    if missing:
        fix = "Only NF4 weights saved by bitsandbytes 0.41 or later can be read."
        raise ModelError(f"tensor {key}{missing[0]} is missing", where=name, fix=fix)
    state = json.loads(bytes(tensors[f"{key}.{STATE_KEY}"].tolist()))
    nested_blocks = state.get("nested_blocksize", NESTED_BLOCK_SIZE)
    code = tensors.get(f"{key}.quant_map", torch.tensor(kernel.NF4_CODE))
    if nested_blocks != NESTED_BLOCK_SIZE or not torch.equal(code.float().cpu(), torch.tensor(kernel.NF4_CODE)):
        raise ModelError("the weight uses another code or nested block size than NF4's", where=name)
    nested_code = tensors.get(f"{key}.nested_quant_map")
    if nested_code is not None and not torch.equal(nested_code.float().cpu(), dynamic_code()):
        raise ModelError("the nested scales use another code than the dynamic 8-bit one", where=name)
    rows, columns = state["shape"]
    packed = tensors[key].contiguous().view(torch.uint8).flatten()  # some folders store the bytes as bfloat16
    if packed.numel() != (rows * columns + 1) // 2:
        raise ModelError(f"{packed.numel()} bytes do not hold a weight of {rows} x {columns}", where=name)
    absmax, nested_absmax = tensors[f"{key}.absmax"], tensors.get(f"{key}.nested_absmax")
    return _Part(rows, packed, absmax, nested_absmax, state.get("nested_offset", 0.0)), state


def from_checkpoint(
    tensors: Mapping[str, Tensor],
    names: tuple[str, ...],
    *,
    scratch: Scratch | None = None,
    implementation: str = "reference",
) -> NF4Weight:
    """Returns the fused NF4 weight of the modules `names` from tensors in bitsandbytes' layout.

    Raises ModelError when a tensor is missing, is not NF4, or when the parts differ in width or block size.
    """
    parts, states = zip(*(_read_part(tensors, name) for name in names), strict=True)
    alike = {(state["shape"][1], state["blocksize"], state["dtype"], "nested_offset" in state) for state in states}
    if len(alike) > 1:
        raise ModelError(f"parts differ in width, block size, dtype or double quantisation: {alike}", where=names[0])
    return NF4Weight(
        parts,
        states[0]["shape"][1],
        source_dtype=getattr(torch, states[0]["dtype"]),
        block_size=states[0]["blocksize"],
        scratch=scratch,
        implementation=implementation,
    )
