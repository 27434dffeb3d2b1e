"""What does the room in a CUDA graph of packed rows cost attention, and would FlexAttention do without?

    PYTHONPATH=src python -m benchmarks.packed_attention packed.json [--models 1b 8b] [--batches 8]

Needs a GPU from Ampere on; no download: values are random. Rows of 4,096 tokens are packed from documents of log-normal
lengths (median 300). For one layer's attention of Llama-3.2-1B (4 rows) and Llama-3.1-8B (2 rows), forward and backward
in bf16, by the GPU's clock, the mean over as many micro-batches:

    exact    variable-length attention with the documents that there are, as it runs launch by launch
    rounded  with a graph's room: documents and the longest rounded up (`GraphShape.rounded`)
    roomy    with the room of the first graph (`GraphShape.roomy`)
    flex     FlexAttention, whose block mask lists the blocks that there are: one graph would do for all documents

Every way's output and gradients are compared with those of `exact` before a time is printed. `--tiny` tries the script
out on a CPU in fp32, without `flex`; its times mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stoker.compose.bench.rows import MEDIAN_TOKENS, SIGMA
from stoker.data.pack import pack
from stoker.distributed.graph_shapes import GraphShape, ends_of, shape_of
from stoker.kernels.attention import attention
from stoker.kernels.documents import Boundaries, DocumentLengths
from stoker.kernels.scored_attention import Scores, flex

TOLERANCE = 2e-2
"""Of a result's norm: bf16, and gradients that are added up in another order."""


class Shape(NamedTuple):
    """A layer's attention in a micro-batch."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    channels: int


SHAPES = {"1b": Shape("Llama-3.2-1B", 4, 4096, 32, 8, 64), "8b": Shape("Llama-3.1-8B", 2, 4096, 32, 8, 128)}
TINY = Shape("tiny", 2, 256, 2, 1, 16)


def documents(shape: Shape, count: int) -> list[tuple[tuple[int, ...], ...]]:
    """Returns the documents' lengths of so many micro-batches, row by row; what a row lacks is one more document."""
    generator = np.random.default_rng(0)
    drawn = np.exp(generator.normal(np.log(MEDIAN_TOKENS), SIGMA, 64 * count * shape.rows)).astype(np.int64)
    drawn = drawn.clip(8, shape.length)
    rows = pack(drawn, shape.length)
    generator.shuffle(rows)
    filled = []
    for row in rows[: count * shape.rows]:
        lengths = [int(drawn[number]) for number in row]
        rest = shape.length - sum(lengths)
        filled.append((*lengths, rest) if rest else tuple(lengths))
    return [tuple(filled[start : start + shape.rows]) for start in range(0, len(filled), shape.rows)]


def ways(shape: Shape, lengths: Sequence[Sequence[int]], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Returns attention of q, k and v by each way."""
    wanted = shape_of(shape.rows, shape.length, 0, lengths)

    def with_room(room: GraphShape) -> Boundaries:
        return Boundaries(
            torch.tensor(ends_of(lengths, room.documents), dtype=torch.int32, device=device), room.longest
        )

    def through(given: DocumentLengths) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, document_lengths=given)

    found = {
        "exact": through(lengths),
        "rounded": through(with_room(wanted.rounded())),
        "roomy": through(with_room(wanted.roomy())),
    }
    if device.type == "cuda":
        found["flex"] = lambda q, k, v: flex(q, k, v, lengths, Scores())
    return found


def run(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of q, k and v."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def milliseconds(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, times: int) -> float:
    """Returns the time of forward and backward, which are queued first so that launching does not count."""
    if grad.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            run(attend, inputs, grad)
        return (time.perf_counter() - start) / times * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    begin.record()
    for _ in range(times):
        run(attend, inputs, grad)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def measure(shape: Shape, device: torch.device, count: int, times: int) -> dict[str, Any]:
    """Returns the mean milliseconds of each way and the blocks that it launches for a head."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    sizes = [(shape.rows, shape.length, heads, shape.channels) for heads in (shape.heads, *[shape.kv_heads] * 2)]
    inputs = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
    grad = torch.randn(sizes[0], device=device, dtype=dtype)
    taken: dict[str, list[float]] = {}
    blocks: dict[str, list[int]] = {"exact": [], "rounded": [], "roomy": []}
    for lengths in documents(shape, count):
        expected: list[Tensor] = []
        wanted = shape_of(shape.rows, shape.length, 0, lengths)
        for name, room in zip(blocks, (wanted, wanted.rounded(), wanted.roomy()), strict=True):
            blocks[name].append(room.blocks)
        for name, attend in ways(shape, lengths, device).items():
            results = run(attend, inputs, grad)
            expected = expected or results
            for result, truth in zip(results, expected, strict=True):
                error = float((result - truth).float().norm() / truth.float().norm())
                if not error <= TOLERANCE:
                    raise SystemExit(f"{shape.name}: {name} is off by {error:.1e}")
            taken.setdefault(name, []).append(milliseconds(attend, inputs, grad, times))
    return {
        "shape": shape._asdict(),
        "milliseconds": {name: statistics.fmean(values) for name, values in taken.items()},
        "blocks": {name: statistics.fmean(values) for name, values in blocks.items()},
    }


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    device = torch.device("cpu" if asked.tiny else "cuda")
    shapes = [TINY] if asked.tiny else [SHAPES[name] for name in asked.models]
    found = [measure(shape, device, 1 if asked.tiny else asked.batches, 1 if asked.tiny else 10) for shape in shapes]
    for one, shape in zip(found, shapes, strict=True):
        print(f"{shape.name}, {shape.rows} x {shape.length}")
        for name, value in one["milliseconds"].items():
            launched = one["blocks"].get(name)
            print(f"  {name:8} {value:7.3f} ms" + ("" if launched is None else f", {launched:,.0f} blocks a head"))
    name = "CPU" if asked.tiny else torch.cuda.get_device_name()
    asked.path.write_text(json.dumps({"device": name, "torch": torch.__version__, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
