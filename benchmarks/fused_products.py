"""Do Triton products with epilogues beat cuBLAS's products and passes around them, under a GPU's power limit?

    PYTHONPATH=src python -m benchmarks.fused_products fused.json [--models 8b 1b] [--plain] [--budget 140]

Needs a Hopper GPU, PyTorch with Triton and NVML; no download: weights and tokens are random. For the linear layers of
Llama-3.1-8B (8,192 tokens) and Llama-3.2-1B (16,384), with LoRA of rank 16, forward and input gradient:

    1. What the engine runs today (updates written, cuBLAS's product adds to them; SwiGLU in passes of its own) and the
       kernels of `benchmarks/fused_kernels.py`, under each of a few tiles, are compared with fp32. A tile whose error
       is above the engine's, or two runs of which differ, is out.
    2. Both run for seconds on end, as CUDA graphs, over two sets of tensors in turn, each larger than L2: time by the
       GPU's clock, energy by NVML's counter. In a burst a card is cooler and faster than in a training step.
    3. All of a layer's products in turn, by the engine, by Triton, and by whichever took less energy for each.

x Aᵀ and the sums for the adapters' gradients are the same in both and left out. `--plain` leaves out adapters, residual
and SwiGLU too: what Triton's products alone take beside cuBLAS's. Prints tables, writes JSON. `--tiny` tries the script
out on a CPU under Triton's interpreter (TRITON_INTERPRET=1); its times mean nothing.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

if not __package__:  # run as a file: Python then looks in the file's own folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import fused_kernels as fused
from benchmarks.energy import LEAD_SECONDS, Nvml, Power, sustained
from benchmarks.fused_kernels import Tile
from stoker.compose.nvml import Unanswered
from stoker.kernels import glu
from stoker.kernels.ahead import compiling_ahead
from stoker.kernels.projection import Piece, Projection, grad_input, project, project_onto

BF16 = torch.bfloat16
RANK = 16
PIECE = Piece("triton")
SETS = 2


@dataclass(frozen=True)
class Shape:
    """A model's layer; `heads`: widths of q, k and v."""

    name: str
    tokens: int
    hidden: int
    heads: tuple[int, int, int]
    inner: int
    layers: int


SHAPES = {
    "8b": Shape("Llama-3.1-8B", 8192, 4096, (4096, 1024, 1024), 14336, 32),
    "1b": Shape("Llama-3.2-1B", 16384, 2048, (2048, 512, 512), 8192, 16),
}
TINY = Shape("tiny", 70, 64, (64, 32, 32), 96, 2)

# One wide tile a multiprocessor with three and with four stages, or two of half the width. Four stages leave 16 KB for
# results and 12 KB for updates.
DEEP = Tile(128, 256, 64, 8, 4, pieces=4, programs=1, merged=True, chunk=16)
THREE = Tile(128, 256, 64, 8, 3, pieces=2, programs=1, merged=True)
PAIR = Tile(128, 128, 64, 4, 3, pieces=2, programs=2, merged=False)
TINY_TILES = [Tile(32, 32, 32, 4, 2, 2, 1, merged=True, chunk=16), Tile(32, 32, 16, 4, 2, 1, 2, merged=False, group=2)]
GROUPS = (8, 16)


def candidates(kind: str) -> list[Tile]:
    """The tiles to try for a kind of product."""
    if kind == "gated":
        tiles = [DEEP._replace(pieces=2), THREE._replace(pieces=1), PAIR]
    elif kind == "gated backward":
        tiles = [DEEP, THREE._replace(pieces=4), PAIR._replace(pieces=4)]
    else:
        tiles = [DEEP, THREE, PAIR]
    return [tile._replace(group=group) for tile in tiles for group in GROUPS]


class Tensors(NamedTuple):
    """A layer's weights with adapters, and what its products read."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    wide_b: Tensor | None
    normed: Tensor
    attended: Tensor
    mid: Tensor
    values: Tensor
    activated: Tensor
    grad: Tensor
    grad_values: Tensor
    grad_qkv: Tensor
    products: dict[str, Tensor | None]
    grad_products: dict[str, Tensor | None]


def make_tensors(shape: Shape, device: str, *, plain: bool = False) -> Tensors:
    """A set of random tensors, those that follow from others computed; without adapters if `plain`."""

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=device) * scale).to(BF16)

    def projection(num_in: int, sizes: Iterable[int]) -> Projection:
        ends = list(itertools.accumulate(sizes))
        slices = tuple(slice(begin, end) for begin, end in itertools.pairwise([0, *ends]))
        a = normal(RANK * len(ends), num_in, scale=num_in**-0.5)
        return Projection(
            normal(ends[-1], num_in, scale=0.02), None, a, normal(ends[-1], RANK, scale=0.02), 1.0, slices
        )

    hidden, inner, tokens = shape.hidden, shape.inner, shape.tokens
    qkv, out = projection(hidden, shape.heads), projection(shape.heads[0], [hidden])
    gate_up, down = projection(hidden, [inner, inner]), projection(inner, [hidden])
    normed, attended, mid = normal(tokens, hidden), normal(tokens, shape.heads[0]), normal(tokens, hidden)
    values = (normed @ gate_up.weight.t()).contiguous()
    activated = glu.gated_reference(values)
    grad = normal(tokens, hidden, scale=1e-2)
    grad_values = glu._launch_backward(values, grad @ down.weight, torch.empty_like(values), activation="silu")
    inputs = {"qkv": normed, "out": attended, "gate_up": normed, "down": activated}
    grads = {"qkv": normal(tokens, sum(shape.heads), scale=1e-2), "out": grad, "gate_up": grad_values, "down": grad}
    layers = {"qkv": qkv, "out": out, "gate_up": gate_up, "down": down}
    kept = (normed, attended, mid, values, activated, grad, grad_values, grads["qkv"])
    if plain:
        bare = (layer._replace(a=None, b=None) for layer in layers.values())
        return Tensors(*bare, None, *kept, dict.fromkeys(layers), dict.fromkeys(layers))
    products = {name: inputs[name] @ layer.a.t() for name, layer in layers.items()}
    grad_products = {name: _grad_product(layer, grads[name]) for name, layer in layers.items()}
    return Tensors(*layers.values(), fused.side_by_side(gate_up.b), *kept, products, grad_products)


def _grad_product(layer: Projection, grad: Tensor) -> Tensor:
    return torch.cat([grad[:, rows] @ layer.b[rows] for rows in layer.slices], dim=1)


@dataclass(frozen=True)
class Case:
    """A product of a layer: how the engine runs it, how Triton does under a tile, and the truth in fp32."""

    name: str
    kind: str
    flops: float
    engine: Callable[[Tensors], tuple[Tensor, ...]]
    triton: Callable[[Tensors, Tile], tuple[Tensor, ...]]
    truth: Callable[[Tensors], tuple[Tensor, ...]]


def cases(shape: Shape, *, plain: bool = False) -> list[Case]:
    """The eight products of a layer in the order of a step; `plain`: and nothing else."""
    tokens = shape.tokens

    def case(name: str, kind: str, size: int, *runs: Any) -> Case:
        return Case(name, kind, 2.0 * tokens * size, *runs)

    qkv, out = shape.hidden * sum(shape.heads), shape.hidden * shape.heads[0]
    gate_up, down = 2 * shape.hidden * shape.inner, shape.hidden * shape.inner
    if plain:
        sizes = {"qkv": qkv, "out": out, "gate_up": gate_up, "down": down}
        sources = {"qkv": "normed", "out": "attended", "gate_up": "normed", "down": "activated"}
        grads = {"down": "grad", "gate_up": "grad_values", "out": "grad", "qkv": "grad_qkv"}
        forward = [case(x, "plain", sizes[x], *_forward(x, source, None)) for x, source in sources.items()]
        return forward + [
            case(f"{x} back", "transposed", sizes[x], *_input_gradient(x, source)) for x, source in grads.items()
        ]
    return [
        case("qkv", "plain", qkv, *_forward("qkv", "normed", None)),
        case("out + residual", "residual", out, *_forward("out", "attended", "mid")),
        case("gate, up, SwiGLU", "gated", gate_up, _engine_gated, _triton_gated, _true_gated),
        case("down + residual", "residual", down, *_forward("down", "activated", "mid")),
        case("down back, SwiGLU back", "gated backward", down, _engine_back, _triton_back, _true_back),
        case("gate, up back", "transposed", gate_up, *_input_gradient("gate_up", "grad_values")),
        case("out back", "transposed", out, *_input_gradient("out", "grad")),
        case("qkv back", "transposed", qkv, *_input_gradient("qkv", "grad_qkv")),
    ]


def _forward(name: str, source: str, residual: str | None) -> tuple[Any, Any, Any]:
    """The engine's, Triton's and the true forward of a projection."""

    def parts(t: Tensors) -> tuple[Projection, Tensor, Tensor | None, Tensor | None]:
        return getattr(t, name), getattr(t, source), t.products[name], residual and getattr(t, residual)

    def engine(t: Tensors) -> tuple[Tensor]:
        layer, x, product, rest = parts(t)
        if rest is None:
            return (project(layer, x, PIECE, product=product)[0],)
        return (project_onto(layer, x, rest, product, implementation="triton"),)

    def by_triton(t: Tensors, tile: Tile) -> tuple[Tensor]:
        layer, x, product, rest = parts(t)
        ends = tuple(rows.stop for rows in layer.slices)
        return (fused.linear(x, layer.weight, product, layer.b, ends=ends, tile=tile, residual=rest, prefetch=True),)

    def truth(t: Tensors) -> tuple[Tensor]:
        layer, x, product, rest = parts(t)
        total = _true_forward(layer, x, product)
        return (total if rest is None else total + rest,)

    return engine, by_triton, truth


def _true_forward(layer: Projection, x: Tensor, product: Tensor | None) -> Tensor:
    total = x.float() @ layer.weight.float().t()
    if product is None:
        return total
    for part, rows in zip(product.split(RANK, dim=1), layer.slices, strict=True):
        total[:, rows] += part.float() @ layer.b[rows].float().t()
    return total


def _input_gradient(name: str, source: str) -> tuple[Any, Any, Any]:
    """The same of the gradient of a projection's input."""

    def engine(t: Tensors) -> tuple[Tensor]:
        return (grad_input(getattr(t, name), getattr(t, source), t.grad_products[name], PIECE),)

    def by_triton(t: Tensors, tile: Tile) -> tuple[Tensor]:
        layer = getattr(t, name)
        return (fused.linear_transposed(getattr(t, source), layer.weight, t.grad_products[name], layer.a, tile=tile),)

    def truth(t: Tensors) -> tuple[Tensor]:
        return (_true_gradient(getattr(t, name), getattr(t, source), t.grad_products[name]),)

    return engine, by_triton, truth


def _true_gradient(layer: Projection, grad: Tensor, grad_product: Tensor | None) -> Tensor:
    total = grad.float() @ layer.weight.float()
    return total if grad_product is None else total.addmm_(grad_product.float(), layer.a.float())


def _engine_gated(t: Tensors) -> tuple[Tensor, Tensor]:
    values, _ = project(t.gate_up, t.normed, PIECE, product=t.products["gate_up"])
    return values, glu.gated(values, implementation="triton")


def _triton_gated(t: Tensors, tile: Tile) -> tuple[Tensor, Tensor]:
    return fused.gated_linear(t.normed, t.gate_up.weight, t.products["gate_up"], t.wide_b, tile=tile)


def _true_gated(t: Tensors) -> tuple[Tensor, Tensor]:
    values = _true_forward(t.gate_up, t.normed, t.products["gate_up"])
    return values, glu.gated_reference(values)


def _engine_back(t: Tensors) -> tuple[Tensor, Tensor]:
    # The engine writes the gradient over gate and up; here they are needed again, and as many bytes are moved.
    grad = grad_input(t.down, t.grad, t.grad_products["down"], PIECE)
    out = glu._launch_backward(t.values, grad, torch.empty_like(t.values), activation="silu", activated=grad)
    return out, grad


def _triton_back(t: Tensors, tile: Tile) -> tuple[Tensor, Tensor]:
    down, product = t.down, t.grad_products["down"]
    return fused.gated_linear_backward(t.grad, down.weight, product, down.a, t.values, tile=tile, prefetch=True)


def _true_back(t: Tensors) -> tuple[Tensor, Tensor]:
    grad = _true_gradient(t.down, t.grad, t.grad_products["down"])
    gate, up = t.values.float().chunk(2, dim=1)
    slope = torch.ops.aten.silu_backward(grad * up, gate)
    activated = torch.nn.functional.silu(gate)
    return torch.cat([slope, grad * activated], dim=1), activated * up


def errors(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[tuple[float, float]]:
    """Of each output: the error's norm as a share of the truth's, and the largest error as one of the largest value."""
    found = []
    for result, true in zip(results, truth, strict=True):
        apart = result.float() - true
        found.append(((apart.norm() / true.norm()).item(), (apart.abs().max() / true.abs().max()).item()))
    return found


def fault(  # noqa: PLR0917
    case: Case, t: Tensors, tile: Tile, engine: list[tuple[float, float]], truth: tuple[Tensor, ...], factor: float
) -> str:
    """What is wrong with Triton's results under a tile; nothing where they are as exact as `factor` times the engine's.

    The engine rounds updates before it adds them. Of the largest error a unit of bf16 may fall either way.
    """
    results = case.triton(t, tile)
    if not all(map(torch.equal, results, case.triton(t, tile))):
        return "two runs differ"
    for index, (ours, theirs) in enumerate(zip(errors(results, truth), engine, strict=True)):
        if not (ours[0] <= factor * theirs[0] + 1e-5 and ours[1] <= 2 * factor * theirs[1] + 2**-8):
            return f"output {index}: errors {ours}, the engine's {theirs}"
    return ""


class Measured(NamedTuple):
    """A case's result: the engine's, Triton's best tile and what that took, and each tile's milliseconds or fault."""

    case: Case
    engine: Power
    tile: Tile | None
    triton: Power | None
    tried: list[tuple[Tile, float | str]]


class Bench:
    """Measurements of one run, until its time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.seconds, self.end = options.seconds, time.monotonic() + options.budget
        self.tiny, self.plain = options.tiny, options.plain
        self.device = "cpu" if options.tiny else "cuda"
        self.nvml: Nvml | None = None
        if not options.tiny:
            try:
                self.nvml = Nvml()
            except Unanswered as error:
                print(f"energy is not measured: {error}", flush=True)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def tiles(self, case: Case) -> list[Tile]:
        return TINY_TILES if self.tiny else candidates(case.kind)

    def power(self, runs: list[Callable[[], object]], *, burst: bool = False) -> Power:
        if burst:
            return sustained(runs, seconds=0.1, nvml=None, lead=0.02)
        return sustained(runs, seconds=self.seconds, nvml=self.nvml, lead=LEAD_SECONDS)

    def compile_ahead(self, todo: list[Case], t: Tensors) -> None:
        """Has all kernels compiled side by side; what fails here fails again, and is said, where its tile is tried."""
        begin = time.monotonic()
        try:
            with compiling_ahead() as asked:
                for case in todo:
                    for tile in self.tiles(case):
                        case.triton(t, tile)
            print(f"{asked.num_kernels} kernels compiled in {time.monotonic() - begin:.1f} s", flush=True)
        except (RuntimeError, triton.errors.TritonError) as error:
            print(f"compiling ahead failed: {type(error).__name__}: {str(error)[:300]}", flush=True)

    def measure(self, case: Case, sets: list[Tensors]) -> Measured:
        """Compares, tries the tiles in bursts, and runs the engine and the best tile for seconds."""
        truth = case.truth(sets[0])
        factor = 2.5 if self.tiny else 1.05  # the interpreter cuts fp32 to bf16, which it does not round
        engine_errors = errors(case.engine(sets[0]), truth)
        tried: list[tuple[Tile, float | str]] = []
        for tile in self.tiles(case):
            runs = [partial(case.triton, t, tile) for t in sets]
            try:
                wrong = fault(case, sets[0], tile, engine_errors, truth, factor)
                tried.append((tile, wrong or self.power(runs, burst=True).ms))
            except (RuntimeError, ValueError, triton.errors.TritonError) as error:
                tried.append((tile, f"{type(error).__name__}: {str(error)[:200]}"))
        del truth
        engine = self.power([partial(case.engine, t) for t in sets])
        good = [(ms, tile) for tile, ms in tried if isinstance(ms, float)]
        tile = min(good)[1] if good else None
        power = None if tile is None else self.power([partial(case.triton, t, tile) for t in sets])
        if not self.tiny:
            torch.cuda.empty_cache()  # of each graph's memory, which no other takes
        return Measured(case, engine, tile, power, tried)

    def layer(self, found: list[Measured], sets: list[Tensors]) -> dict[str, Power]:
        """All products in turn: the engine's, Triton's where it has a tile, and for each whichever took less."""
        ways: dict[str, list[bool]] = {
            "engine": [False] * len(found),
            "Triton": [one.tile is not None for one in found],
            "best of both": [is_better(one) for one in found],
        }
        results = {}
        for name, by_triton in ways.items():

            def run(t: Tensors, by_triton: list[bool] = by_triton) -> None:
                for one, chosen in zip(found, by_triton, strict=True):
                    one.case.triton(t, one.tile) if chosen and one.tile else one.case.engine(t)

            results[name] = self.power([partial(run, t) for t in sets])
        return results


def is_better(one: Measured) -> bool:
    """Whether Triton took less energy, or less time where that was not measured."""
    if one.triton is None:
        return False
    if one.triton.joules is None or one.engine.joules is None:
        return one.triton.ms < one.engine.ms
    return one.triton.joules < one.engine.joules


def cell(power: Power | None, flops: float) -> str:
    """Milliseconds, joules, TFLOP/s, watts and MHz."""
    if power is None:
        return f"{'no tile works':>38}"
    joules, watts, mhz = (f"{x:.{n}f}" if x is not None else "-" for x, n in zip(power[1:], (3, 0, 0), strict=True))
    return f"{power.ms:8.3f} {joules:>7} {flops / power.ms * 1e-9:7.1f} {watts:>6} {mhz:>6}"


def said(tile: Tile | None) -> str:
    if tile is None:
        return ""
    merged = "merged" if tile.merged else f"{tile.programs} programs"
    return f"{tile.rows}x{tile.columns} {tile.stages} stages, {merged}, {tile.pieces} pieces, groups of {tile.group}"


def run_shape(bench: Bench, shape: Shape) -> dict[str, Any]:
    """Measures and prints one model; returns what goes into the JSON."""
    todo = cases(shape, plain=bench.plain)
    sets = [make_tensors(shape, bench.device, plain=bench.plain) for _ in range(SETS)]
    print(f"\n{shape.name}, {shape.tokens} tokens")
    if not bench.tiny:
        bench.compile_ahead(todo, sets[0])
    columns = f"{'ms':>8} {'J':>7} {'TFLOP/s':>7} {'W':>6} {'MHz':>6}"
    print(
        f"{'':24} | {'engine: cuBLAS and passes':38} | {'Triton, fused':38} |\n{'':24} | {columns} | {columns} | tile"
    )
    found, skipped = [], []
    for case in todo:
        if bench.is_over:
            skipped.append(case.name)
            continue
        one = bench.measure(case, sets)
        found.append(one)
        cells = f"{cell(one.engine, case.flops)} | {cell(one.triton, case.flops)}"
        print(f"{case.name:24} | {cells} | {said(one.tile)}", flush=True)
        for tile, result in one.tried:
            if isinstance(result, str):
                print(f"    {said(tile)}: {result}", flush=True)
    print(f"not measured, the time was up: {', '.join(skipped)}" if skipped else "")
    result: dict[str, Any] = {"shape": vars(shape), "cases": [as_json(one) for one in found], "skipped": skipped}
    if not skipped and not bench.is_over:
        result["layer"] = {name: power._asdict() for name, power in print_layer(bench, shape, found, sets).items()}
    return result


def print_layer(bench: Bench, shape: Shape, found: list[Measured], sets: list[Tensors]) -> dict[str, Power]:
    ways = bench.layer(found, sets)
    flops, before = sum(one.case.flops for one in found), ways["engine"]
    print(f"what a whole layer would gain, and {shape.layers} of them a step:")
    for name, power in ways.items():
        gain = f"{before.ms - power.ms:+.3f} ms a layer, {shape.layers * (before.ms - power.ms):+.2f} ms a step"
        if power.joules is not None and before.joules is not None:
            gain += f", {shape.layers * (before.joules - power.joules):+.2f} J a step"
        print(f"    {name:20} | {cell(power, flops)} | {gain}", flush=True)
    print(f"    Triton took less for: {', '.join(one.case.name for one in found if is_better(one)) or 'none'}")
    return ways


def as_json(one: Measured) -> dict[str, Any]:
    return {
        "name": one.case.name,
        "flops": one.case.flops,
        "engine": one.engine._asdict(),
        "triton": None if one.triton is None else one.triton._asdict(),
        "tile": None if one.tile is None else one.tile._asdict(),
        "tried": [{"tile": list(tile), "result": result} for tile, result in one.tried],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--budget", type=float, default=140.0, help="seconds after which nothing more is started")
    parser.add_argument("--plain", action="store_true", help="products alone, without what is around them")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, to try the script out")
    options = parser.parse_args()
    if not options.tiny and (not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9):
        sys.exit("benchmarks.fused_products needs a Hopper GPU; there is none here.")
    torch.manual_seed(0)
    bench = Bench(options)
    facts = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": options.seconds,
        "plain": options.plain,
    }
    facts["device"] = "cpu" if options.tiny else torch.cuda.get_device_name()
    print(json.dumps(facts), flush=True)
    results = {}
    with torch.no_grad():
        for name in ["tiny"] if options.tiny else options.models:
            if bench.is_over:
                sys.exit(f"{name} is not measured: the time is up")
            results[name] = run_shape(bench, TINY if options.tiny else SHAPES[name])
            options.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
            if not options.tiny:
                torch.cuda.empty_cache()
    faulty = any(case["tile"] is None for result in results.values() for case in result["cases"])
    return 1 if faulty or not results else 0


if __name__ == "__main__":
    sys.exit(main())
