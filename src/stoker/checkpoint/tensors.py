"""Writes safetensors files one tensor at a time.

The format is a little-endian 64-bit header length, a JSON header padded to eight bytes, and the tensors' bytes
(https://huggingface.co/docs/safetensors). The library's own writer moves all tensors to host memory first; here peak
host memory is one tensor, and the file is hashed as it is written. Reading is the library's.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stoker.checkpoint.durable import DurableFile

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


PARTS = "parts"
"""Key of a file's metadata: of tensors in parts, by name, the part's offsets and the whole's shape, as JSON."""


def write(
    file: DurableFile,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
    *,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes `tensors` to `file`, moving one at a time to host memory; `parts` says which are in parts (`PARTS`).

    With `read`, `tensors` have shapes and dtypes alone, as those on the meta device: it gives the values by name.

    Raises:
        ValueError: `read` gives values of another shape or dtype.
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    # Widest elements first, so that every tensor starts at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {"__metadata__": {"format": "pt"} | ({PARTS: json.dumps(parts)} if parts else {})}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}  # type: ignore[dict-item]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in ordered:
        values = read(name) if read else tensor
        if values.shape != tensor.shape or values.dtype != tensor.dtype:
            raise ValueError(f"{name} is {values.dtype} {list(values.shape)}, not {tensor.dtype} {list(tensor.shape)}")
        if values.numel():
            file.write(_bytes(values))
        del values  # before the next one is read


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
