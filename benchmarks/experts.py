"""Mixtures of experts on one GPU: the grouped products, and whole LoRA training steps.

    PYTHONPATH=src python benchmarks/experts.py OUT kernels qwen mixtral mixtral-nf4 [--profile] [--steps 8]

Needs a CUDA GPU and PyTorch with Triton; no download: weights and tokens are random. `kernels` times each product of
one layer of Qwen3-30B-A3B's shape under several tiles, beside `torch._grouped_mm` on rows gathered before; a model
trains LoRA of rank 16 on attention and experts, 2 x 4096 tokens, layers recomputed. Before a step's number is printed,
a small model's loss and gradients must equal those of the references, the step's own loss must be finite and its
gradient norm above zero. Results go to OUT/experts.jsonl, profiles to OUT/profile-NAME.txt.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import triton
from torch import Tensor, nn

from stoker.adapters.fused_block import freeze_into, why_not_fused
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.kernels import grouped_matmul as grouped
from stoker.kernels import routed_rows
from stoker.kernels.grouped_matmul import Tile
from stoker.kernels.grouped_outer import grouped_outer
from stoker.kernels.linear_cross_entropy import linear_cross_entropy
from stoker.models.build import on_meta
from stoker.nn.block import Block
from stoker.nn.decoder import Decoder
from stoker.nn.moe import ExpertLinear, FrozenExpertLinear
from stoker.quant.experts import NF4Experts
from stoker.quant.formats import quantize
from stoker.quant.frozen import Scratch

GIB = 2**30
BF16 = torch.bfloat16
ROWS, LENGTH = 2, 4096
QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Cell:
    """A model to train: its configuration, and the format of its base (None: bf16)."""

    config: dict[str, Any]
    kind: str | None = None


CELLS = {
    "qwen": Cell(QWEN),
    "qwen-nf4": Cell(QWEN, "nf4"),
    "mixtral": Cell(MIXTRAL),
    "mixtral-nf4": Cell(MIXTRAL, "nf4"),
}


def report(out: Path, **values: object) -> None:
    line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()})
    print(line, flush=True)
    with (out / "experts.jsonl").open("a") as file:
        file.write(line + "\n")


def milliseconds(run: Callable[[], object], *, repeats: int = 20) -> float:
    """Median time of `run` on the GPU after warming up."""
    for _ in range(4):
        run()
    torch.cuda.synchronize()
    torch.cuda._sleep(30_000_000)  # time in which all runs are queued: launching must not count
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


TILES = [
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 8, 4),
]


def run_kernels(out: Path) -> None:
    """Products of a layer of the Qwen shape, and of Mixtral's, with as many rows as a step has."""
    for name, config, inner in (("qwen", QWEN, 768), ("mixtral", MIXTRAL, 14336)):
        time_layer(out, name, config, inner)
        gc.collect()
        torch.cuda.empty_cache()


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16) * scale


def time_layer(out: Path, name: str, config: dict[str, Any], inner: int) -> None:
    experts, width, top_k = config["num_local_experts"], config["hidden_size"], config["num_experts_per_tok"]
    tokens, num_rows = ROWS * LENGTH, ROWS * LENGTH * top_k
    scores = torch.rand(tokens, experts, device="cuda")
    chosen = scores.topk(top_k, dim=1).indices
    order = routed_rows.sort_by_expert(chosen, experts)
    x, wide, inside, low = (
        random(tokens, width),
        random(num_rows, 2 * inner),
        random(num_rows, inner),
        random(num_rows, 16),
    )
    up, down = random(experts, 2 * inner, width, scale=0.02), random(experts, width, inner, scale=0.02)
    a_up, b_up = random(experts, 16, width), random(experts, 2 * inner, 16)
    a_down, b_down = random(experts, 16, inner), random(experts, width, 16)
    index = order.tokens
    products: dict[str, tuple[Tensor, Tensor, dict[str, Any], Tensor]] = {
        "gate_up": (x, up, {"rows": index}, b_up),
        "down": (inside, down, {}, b_down),
        "gate_up back": (wide, up, {"transposed": True}, a_up),
        "down back": (x, down, {"rows": index, "transposed": True}, a_down),
    }
    for label, (left, weight, options, factor) in products.items():
        kernel = f"{name} {label}"
        time_tiles(out, kernel, left, weight, order.ends, options, {"product": low, "factor": factor})
        beside_torch(out, kernel, left, weight, order.ends, options)
    matmul = partial(grouped.grouped_matmul, implementation="triton")
    outer = partial(grouped_outer, implementation="triton")
    weights, rows = torch.rand(tokens, top_k, device="cuda"), random(num_rows, width)
    rest: dict[str, Callable[[], object]] = {
        "sort": lambda: routed_rows.sort_by_expert(chosen, experts),
        "top k": lambda: scores.topk(top_k, dim=1),
        "low gate_up": lambda: matmul(x, a_up, order.ends, rows=index),
        "low down": lambda: matmul(inside, a_down, order.ends),
        "grad low gate_up": lambda: matmul(wide, b_up, order.ends, transposed=True),
        "grad low down": lambda: matmul(x, b_down, order.ends, rows=index, transposed=True),
        "dA gate_up": lambda: outer(low, x, order.ends, right_rows=index),
        "dB gate_up": lambda: outer(wide, low, order.ends),
        "dA down": lambda: outer(low, inside, order.ends),
        "dB down": lambda: outer(x, low, order.ends, left_rows=index),
        "gate": lambda: routed_rows.gate(wide, implementation="triton"),
        "gate back": lambda: routed_rows.gate_backward(wide, inside, weights.flatten(), implementation="triton"),
        "combine": lambda: routed_rows.combine(rows, order.place, weights, top_k, implementation="triton"),
    }
    for kernel, run in rest.items():
        report(out, kernel=f"{name} {kernel}", ms=milliseconds(run))


def time_tiles(  # noqa: PLR0917
    out: Path,
    kernel: str,
    left: Tensor,
    weight: Tensor,
    ends: Tensor,
    options: dict[str, Any],
    update: dict[str, Tensor],
) -> None:
    """The product under each tile, without and with its low-rank update."""
    flops = 2.0 * update["product"].shape[0] * weight.shape[1] * weight.shape[2]
    run = partial(grouped.grouped_matmul, left, weight, ends, implementation="triton", **options)
    default = grouped.WIDE, grouped.BOXES
    for tile, boxes in product(TILES if kernel.startswith("qwen") else TILES[:1], (False, True)):
        grouped.WIDE, grouped.BOXES = tile, boxes
        try:
            plain, updated = milliseconds(run), milliseconds(partial(run, **update))
            report(
                out,
                kernel=kernel,
                tile=list(tile),
                boxes=boxes,
                ms=plain,
                with_update_ms=updated,
                tflops=flops / plain * 1e-9,
            )
        except (RuntimeError, triton.errors.TritonError) as error:  # does not fit; the rest goes on
            report(out, kernel=kernel, tile=list(tile), boxes=boxes, error=str(error)[:120])
    grouped.WIDE, grouped.BOXES = default


def beside_torch(  # noqa: PLR0917
    out: Path, kernel: str, left: Tensor, weight: Tensor, ends: Tensor, options: dict[str, Any]
) -> None:
    """PyTorch's own product of rows gathered before, its time, the gather's, and how far apart the results are."""
    rows = options.get("rows")
    taken = left if rows is None else left[rows]
    matrices = weight if options.get("transposed") else weight.transpose(1, 2)
    run = partial(torch._grouped_mm, taken, matrices, offs=ends)
    try:
        ms, theirs = milliseconds(run), run()
    except (RuntimeError, AttributeError) as error:
        report(out, kernel=kernel, torch_error=str(error)[:200])
        return
    ours = grouped.grouped_matmul(left, weight, ends, implementation="triton", **options)
    report(
        out,
        kernel=kernel,
        torch_ms=ms,
        gather_ms=0.0 if rows is None else milliseconds(lambda: left[rows]),
        torch_tflops=2.0 * taken.shape[0] * weight.shape[1] * weight.shape[2] / ms * 1e-9,
        difference=((ours.float() - theirs.float()).norm() / theirs.float().norm()).item(),
    )


def build(config: dict[str, Any], kind: str | None, *, kernels: str = "triton") -> Decoder:
    """The model on the GPU with random bf16 weights, adapters on attention and experts, its base's format."""
    model = on_meta(read(config, "benchmark"), dtype=BF16, kernels=kernels).to_empty(device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0.0, 0.02)
    scratch = Scratch()
    if kind is not None:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ExpertLinear):
                    parts = 2 if name == "gate_up" else 1
                    stored = NF4Experts.quantize(
                        child.weight.detach(), parts=parts, scratch=scratch, implementation=kernels
                    )
                    parent.register_module(name, FrozenExpertLinear(child, stored))
    add_lora(model, rank=16, alpha=16)
    if kind is not None:

        def make(weight: Tensor, part_rows: tuple[int, ...]) -> nn.Module:
            made = quantize(weight, kind, part_rows=part_rows, scratch=scratch, implementation=kernels)
            return cast("nn.Module", made)

        freeze_into(model, make)
    assert why_not_fused(model) is not None
    for block in model.blocks:
        cast("Block", block).recompute = True
    return model


def loss_of(model: Decoder, ids: Tensor, *, kernels: str = "triton") -> Tensor:
    hidden = model(ids).flatten(0, 1)
    targets = ids.roll(-1, dims=1).flatten()
    return linear_cross_entropy(hidden, model.head_weight, targets, implementation=kernels) / targets.numel()


def check_parity(cell: Cell) -> None:
    """A small model's loss and adapter gradients against those of the references; raises AssertionError."""
    config = cell.config | SMALL
    ids = torch.randint(0, 512, (2, 256), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    results = []
    for kernels in ("reference", "triton"):
        model = build(config, cell.kind, kernels=kernels)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_b" in name:
                parameter.data.normal_(0.0, 0.02, generator=torch.Generator("cuda").manual_seed(index))
        loss = loss_of(model, ids, kernels=kernels)
        loss.backward()
        grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    (loss, grads), (triton_loss, triton_grads) = results
    assert abs(loss - triton_loss) < 2e-3 * loss, f"loss {triton_loss} instead of {loss}"
    assert grads.keys() == triton_grads.keys()
    whole = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
    apart = math.sqrt(sum((triton_grads[n] - g).square().sum().item() for n, g in grads.items()))
    # Two bf16 results, each some 1e-2 off, and a few tokens whose experts are chosen by a hair.
    assert apart < 8e-2 * whole, f"the gradient differs by {apart / whole:.2g} of its norm"


def run_cell(name: str, out: Path, *, steps: int, profile: bool, keep_attention: bool) -> None:
    cell = CELLS[name]
    start = time.perf_counter()
    model = build(cell.config, cell.kind)
    for block in model.blocks:
        cast("Block", block).keep_attention = keep_attention
    torch.cuda.synchronize()
    build_seconds = time.perf_counter() - start
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator("cuda").manual_seed(1)

    def step() -> tuple[float, float, float]:
        size = cell.config["vocab_size"]
        ids = torch.randint(0, size, (ROWS, LENGTH), device="cuda", generator=generator)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = loss_of(model, ids)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begin, loss.item(), norm.item()

    results = [step() for _ in range(steps + 3)]
    losses, norms = [r[1] for r in results], [r[2] for r in results]
    assert all(map(math.isfinite, losses)), losses
    assert min(norms) > 0, norms
    seconds = statistics.median(r[0] for r in results[3:])
    peak = torch.cuda.max_memory_allocated() / GIB
    check_parity(cell)
    report(
        out,
        cell=name,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        boxes=grouped.BOXES,
        keep_attention=keep_attention,
        tokens_per_second=ROWS * LENGTH / seconds,
        step_ms=seconds * 1e3,
        fastest_ms=min(r[0] for r in results[3:]) * 1e3,
        first_step_s=results[0][0],
        build_s=build_seconds,
        held_gib=held / GIB,
        peak_gib=peak,
        trained=sum(p.numel() for p in parameters),
        first_loss=losses[0],
        loss=losses[-1],
        gradient_norm=norms[-1],
    )
    if profile:
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as recorded:
            step()
        averages = recorded.key_averages()
        table = averages.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=100)
        (out / f"profile-{name}.txt").write_text(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("what", nargs="+", choices=["kernels", *CELLS])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--keep-attention", action="store_true", help="keep attention's results")
    parser.add_argument("--pointers", action="store_true", help="read tiles through pointers, not Hopper's descriptors")
    parser.add_argument("--profile", action="store_true", help="write the time of each GPU kernel of one step")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/experts.py needs a CUDA GPU; there is none here.")
    grouped.BOXES = not options.pointers
    options.out.mkdir(parents=True, exist_ok=True)
    for what in options.what:
        try:
            if what == "kernels":
                run_kernels(options.out)
            else:
                run_cell(
                    what,
                    options.out,
                    steps=options.steps,
                    profile=options.profile,
                    keep_attention=options.keep_attention,
                )
        except (AssertionError, RuntimeError, ValueError) as error:
            # One cell's failure must not cost the others the machine; it is printed as its result.
            report(options.out, cell=what, error=f"{type(error).__name__}: {str(error)[:300]}")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
