"""The single-GPU engine: kernels against their references and the bandwidth, and whole training steps.

    PYTHONPATH=src python benchmarks/engine.py kernels matmuls A B C E F G --out engine.jsonl [--profile]

Needs a CUDA GPU and PyTorch with Triton; no download: weights and tokens are random, which is right for speed and
memory. `kernels` prints the time of each kernel beside its reference and the share of the measured copy bandwidth;
`matmuls` what adapters and attention cost; a letter runs training steps (LoRA, rank 16, all projections, AdamW) of one
setting. Before a step's number is printed, a small model's loss and gradients must equal those of the references, and
the step's own loss must be finite and its gradient norm above zero.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stoker.adapters.fused_block import freeze_into, fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.kernels import fp8, glu, linear_cross_entropy, low_rank, rms_norm, rope, rounded_glu, turn_logits
from stoker.kernels.attention import attention
from stoker.kernels.offload import HostOffload
from stoker.models.build import on_meta
from stoker.nn.decoder import Decoder
from stoker.quant.formats import quantize
from stoker.quant.fp8 import Fp8Weight
from stoker.quant.frozen import Scratch

GIB = 2**30
BF16 = torch.bfloat16
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Setting:
    """One line of the table of steps: model, rows, their length, the base's format, what layers keep, host offload."""

    config: dict
    rows: int
    length: int
    kind: str | None = None
    keep: str = "all"
    offload: bool = False
    tile_tokens: int | None = None
    adapter: bool = True
    graph: bool = False


SETTINGS = {
    "A": Setting(LLAMA_8B, 2, 4096),
    "A-mixer": Setting(LLAMA_8B, 2, 4096, keep="mixer"),
    "B": Setting(LLAMA_8B, 2, 4096, keep="attention", offload=True),
    "B-gpu": Setting(LLAMA_8B, 2, 4096, keep="attention"),
    "B-input": Setting(LLAMA_8B, 2, 4096, keep="input", offload=True),
    "C": Setting(LLAMA_8B, 2, 4096, kind="nf4", keep="attention", offload=True),
    "D": Setting(LLAMA_8B, 1, 32768, kind="nf4", keep="attention", offload=True, tile_tokens=8192),
    "E": Setting(LLAMA_1B, 8, 2048),
    "F": Setting(LLAMA_8B, 2, 4096, kind="fp8"),
    "G": Setting(LLAMA_1B, 1, 512, graph=True),
    "G-eager": Setting(LLAMA_1B, 1, 512),
    "I": Setting(LLAMA_1B, 8, 2048, adapter=False),
    "I-mixer": Setting(LLAMA_1B, 8, 2048, adapter=False, keep="mixer"),
}


def milliseconds(run: Callable[[], object], *, repeats: int = 20) -> float:
    """Median time of `run` on the GPU after warming up."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # some 25 ms in which all runs are queued: launching must not count
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def report(out: Path | None, **values: object) -> None:
    line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()})
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype) * scale


def gradient_of(op: Callable[..., object], *inputs: Tensor) -> Callable[[], object]:
    """A call that runs only the backward of `op`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def kernel_cases(tokens: int = 8192) -> Iterator[tuple[str, int, Callable[[str], Callable[[], object]]]]:
    """Name, bytes that must be moved, and for an implementation the call to time; 8B shapes."""
    width, inner, heads, kv_heads, channels = 4096, 14336, 32, 8, 128
    x, residual, weight = random(tokens, width), random(tokens, width), random(width)
    unit = tokens * width * 2
    yield (
        "add_rms_norm forward",
        4 * unit,
        lambda kind: lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-5, implementation=kind),
    )
    yield (
        "add_rms_norm backward",
        4 * unit,
        lambda kind: gradient_of(
            lambda a, b: rms_norm.add_rms_norm(a, b, weight, 1e-5, implementation=kind), x, residual
        ),
    )
    yield (
        "rms_norm backward with weight",
        3 * unit,
        lambda kind: gradient_of(lambda a, w: rms_norm.rms_norm(a, w, 1e-5, implementation=kind), x, weight),
    )
    qkv = random(2, tokens // 2, (heads + 2 * kv_heads) * channels)
    angles = torch.rand(1, tokens // 2, channels // 2, device="cuda")
    tables = (angles.cos(), angles.sin())

    def split(kind: str) -> Callable[[Tensor], object]:
        return lambda t: rope.split_and_rotate(t, *tables, num_heads=heads, num_kv_heads=kv_heads, implementation=kind)

    yield "split_and_rotate forward", 2 * qkv.numel() * 2, lambda kind: lambda: split(kind)(qkv)
    yield "split_and_rotate backward", 2 * qkv.numel() * 2, lambda kind: gradient_of(split(kind), qkv)
    gate_up, grad = random(tokens, 2 * inner), random(tokens, inner)
    size = gate_up.numel() * 2
    yield "swiglu forward", size * 3 // 2, lambda kind: lambda: glu.gated(gate_up, implementation=kind)
    yield (
        "swiglu backward with activation",
        size * 3,
        lambda kind: lambda: glu.gated_backward(gate_up, grad, implementation=kind),
    )
    if fp8.can_multiply_fp8(x.device):
        yield from rounded_cases(gate_up, grad)
    yield from adapter_cases(gate_up, grad, qkv.flatten(0, 1), x)
    logits, targets = random(1024, 128256), torch.randint(0, 128256, (1024,), device="cuda")
    options = linear_cross_entropy.LossOptions()
    turns = {
        "triton": turn_logits.turn_logits_triton,
        "reference": turn_logits.turn_logits_reference,
    }
    yield (
        "logits to loss and gradient (1,024 rows)",
        3 * logits.numel() * 2,
        lambda kind: lambda: turns[kind](logits, None, targets, None, options=options, with_gradient=True),
    )
    yield from format_cases(random(2 * inner, width, scale=0.02), x)


def rounded_cases(gate_up: Tensor, grad: Tensor) -> Iterator[tuple[str, int, Callable[[str], Callable[[], object]]]]:
    """The same for gates that leave their results in fp8 too; "reference" are two passes, Triton's too."""
    (tokens, inner), size = grad.shape, gate_up.numel() * 2
    factor = torch.rand(2 * inner, device="cuda")
    room, grad_room = (fp8.empty_rounded(tokens, columns, grad.device) for columns in (inner, 2 * inner))

    def backward_by_two() -> object:
        glu.gated_backward(gate_up, grad, implementation="triton")
        return fp8.quantize_rows(gate_up, factor, implementation="triton")

    forward = {
        "triton": lambda: rounded_glu.gated_rounded(gate_up, room),
        "reference": lambda: fp8.quantize_rows(glu.gated(gate_up, implementation="triton"), implementation="triton"),
    }
    backward = {
        "triton": lambda: rounded_glu.gated_rounded_backward(gate_up, grad, grad_room, factor),
        "reference": backward_by_two,
    }
    yield "swiglu forward, also in fp8 (beside two passes)", size * 7 // 4, forward.__getitem__
    yield "swiglu backward, also in fp8 (beside two passes)", size * 7 // 2, backward.__getitem__


def adapter_cases(
    gate_up: Tensor, grad: Tensor, qkv: Tensor, x: Tensor, rank: int = 16
) -> Iterator[tuple[str, int, Callable[[str], Callable[[], object]]]]:
    """The same for what runs adapters, rank 16."""
    tokens, inner = grad.shape
    product = random(tokens, rank)
    for name, rows, sizes in [
        ("gate_up", gate_up, (inner, inner)),
        ("qkv", qkv, (4096, 1024, 1024)),
        ("out", x, (4096,)),
    ]:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        slices = [slice(end - part, end) for end, part in zip(ends, sizes, strict=True)]
        p, b = random(tokens, rank * len(sizes)), random(sum(sizes), rank)
        yield (
            f"dP and dB of {name}",
            rows.numel() * 2,
            lambda kind, rows=rows, p=p, b=b, slices=slices: (
                lambda: low_rank.grad_pair(rows, p, b, slices=slices, scaling=1.0, implementation=kind)
            ),
        )
    y, b = random(*x.shape), random(x.shape[1], rank)
    yield (
        "update and residual",
        3 * x.numel() * 2,
        lambda kind: lambda: low_rank.add_update(y, x, product, b, scaling=1.0, implementation=kind),
    )


def format_cases(weight: Tensor, x: Tensor) -> Iterator[tuple[str, int, Callable[[str], Callable[[], object]]]]:
    """The same for frozen formats, with a gate-up weight."""
    frozen = {kind: quantize(weight, "nf4", implementation=kind) for kind in ("reference", "triton")}
    buffer = torch.empty_like(weight)
    yield (
        "nf4 dequantise (gate_up)",
        int(weight.numel() * 2.516),
        lambda kind: lambda: frozen[kind].dequantize(buffer, dtype=BF16),
    )
    yield "fp8 quantise rows", x.numel() * 3, lambda kind: lambda: fp8.quantize_rows(x, implementation=kind)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written counted."""
    source, target = (torch.empty(2**29, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def run_kernels(out: Path | None) -> None:
    bandwidth = copy_bandwidth()
    report(out, kernel="copy of 512 MiB", gigabytes_per_second=bandwidth)
    for name, num_bytes, make in kernel_cases():
        times = {kind: milliseconds(make(kind)) for kind in ("reference", "triton")}
        rate = num_bytes / times["triton"] / 1e6
        report(
            out,
            kernel=name,
            reference_ms=times["reference"],
            triton_ms=times["triton"],
            gigabytes_per_second=rate,
            share_of_copy=rate / bandwidth,
        )


def time_projection(num_in: int, num_out: int, parts: int, tokens: int) -> dict[str, float]:
    """Milliseconds of a projection's products: its own, its adapters' one by one, and with these taken in.

    "taking in" is one matmul whose inner size holds the adapters: [X, P] [W, s B]ᵀ and [dY, dP] [W; A], 64 columns
    more, which would save reading and writing Y and dX again.
    """
    pad, rank, width = 64, 16 * parts, num_out // parts
    x, grad = random(tokens, num_in), random(tokens, num_out)
    weight, a, b = random(num_out, num_in, scale=0.02), random(rank, num_in), random(width, 16)
    wide_x, wide_grad = random(tokens, num_in + pad), random(tokens, num_out + pad)
    wide = random(num_out + pad, num_in + pad, scale=0.02)
    product, y = x @ a.t(), x @ weight.t()
    pieces = list(zip(y.split(width, dim=1), product.split(16, dim=1), strict=True))
    runs = {
        "forward": lambda: x @ weight.t(),
        "backward": lambda: grad @ weight,
        "x_a": lambda: x @ a.t(),
        "y_update": lambda: [piece.addmm_(part, b.t()) for piece, part in pieces],
        "grad_product": lambda: [piece @ b for piece in grad.split(width, dim=1)],
        "grad_b": lambda: [piece.t() @ part for piece, part in pieces],
        "grad_a": lambda: product.t() @ x,
        "grad_x_update": lambda: x.addmm_(product, a),
        "forward_taking_in": lambda: wide_x @ wide[:num_out].t(),
        "backward_taking_in": lambda: wide_grad @ wide[:, :num_in],
    }
    return {f"{name}_ms": milliseconds(run) for name, run in runs.items()}


def time_attention(kind: str, tokens: int) -> dict[str, float]:
    heads = [random(2, tokens // 2, n, 128) for n in (32, 8, 8)]

    def run(*tensors: Tensor) -> Tensor:
        return attention(*tensors, implementation=kind)

    return {"forward_ms": milliseconds(lambda: run(*heads)), "backward_ms": milliseconds(gradient_of(run, *heads))}


def run_matmuls(out: Path | None, tokens: int = 8192) -> None:
    """Products of one 8B layer and attention by both choices."""
    for name, num_in, num_out, parts in [
        ("qkv", 4096, 6144, 3),
        ("out", 4096, 4096, 1),
        ("gate_up", 4096, 28672, 2),
        ("down", 14336, 4096, 1),
    ]:
        report(out, matmul=name, **time_projection(num_in, num_out, parts, tokens))
    for kind in ("reference", "triton"):
        report(out, attention=kind, **time_attention(kind, tokens))


def build(setting: Setting, *, kernels: str = "triton", fuse: bool = True) -> Decoder:
    """The setting's model on the GPU with random bf16 weights, its adapters, its base's format, its rungs."""
    model = on_meta(read(setting.config, "benchmark"), dtype=BF16, kernels=kernels).to_empty(device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0.0, 0.02)
    if setting.adapter:
        add_lora(model, rank=16, alpha=16)
    if setting.kind is not None:
        scratch = Scratch()

        def make(weight: Tensor, part_rows: tuple[int, ...]) -> nn.Module:
            if setting.kind == "fp8":
                return Fp8Weight.quantize(weight, keep_transposed=True, scratch=scratch, implementation=kernels)
            return quantize(weight, setting.kind, part_rows=part_rows, scratch=scratch, implementation=kernels)

        freeze_into(model, make)
    if fuse:
        fuse_blocks(
            model,
            keep=setting.keep,
            implementation=kernels,
            offload=HostOffload() if setting.offload else None,
            tile_tokens=setting.tile_tokens,
        )
    return model


def loss_of(model: Decoder, ids: Tensor, *, kernels: str = "triton", num_rows: int | None = None) -> Tensor:
    hidden = model(ids).flatten(0, 1)
    targets = ids.roll(-1, dims=1).flatten()
    loss = linear_cross_entropy.linear_cross_entropy(
        hidden, model.head_weight, targets, num_rows=num_rows, implementation=kernels
    )
    return loss / targets.numel()


def check_parity(setting: Setting) -> None:
    """A small model's loss and adapter gradients against those of the references, op by op; raises AssertionError."""
    small = replace(setting, config=TINY, rows=2, length=256, kind=None if setting.kind == "fp8" else setting.kind)
    ids = torch.randint(0, 512, (2, 256), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    results = []
    for kernels, fuse in (("reference", False), ("triton", True)):
        model = build(small, kernels=kernels, fuse=fuse)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_b" in name:
                generator = torch.Generator("cuda").manual_seed(index)
                parameter.data.normal_(0.0, 0.02, generator=generator)
        loss = loss_of(model, ids, kernels=kernels)
        loss.backward()
        grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    (loss, grads), (fused_loss, fused_grads) = results
    assert abs(loss - fused_loss) < 2e-3 * loss, f"loss {fused_loss} instead of {loss}"
    assert grads.keys() == fused_grads.keys()
    worst = max(((fused_grads[n] - g).norm() / g.norm()).item() for n, g in grads.items())
    assert worst < 5e-2, f"a gradient differs by {worst:.2g} of its norm"  # two bf16 results, each some 1e-2 off


def training_step(model: Decoder, ids: Tensor, *, graph: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that trains one step on what `ids` holds then and returns loss and gradient norm.

    With `graph`, forward, backward and optimiser are captured once as a CUDA graph and replayed: one launch a step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=graph)

    def eager() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, ids, num_rows=ids.numel() if graph else None)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        return loss.detach(), norm

    if not graph:
        return eager
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels, builds attention's plans and the optimiser's states
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = eager()

    def replay() -> tuple[Tensor, Tensor]:
        captured.replay()
        return results

    return replay


def run_steps(name: str, out: Path | None, *, steps: int, profile: bool) -> None:
    setting = SETTINGS[name]
    check_parity(setting)
    gc.collect()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    model = build(setting)
    torch.cuda.synchronize()
    build_seconds = time.perf_counter() - start
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.zeros((setting.rows, setting.length), dtype=torch.int64, device="cuda")
    run = training_step(model, ids, graph=setting.graph)

    def step() -> tuple[float, float, float]:
        return timed_step(run, ids, setting.config["vocab_size"])

    results = [step() for _ in range(steps + 3)]
    for _ in range(max(1, int(0.8 / results[-1][0]))):  # what runs while nvidia-smi looks
        run()
    speed = clocks()
    losses, norms = [r[1] for r in results], [r[2] for r in results]
    assert all(map(math.isfinite, losses)), losses
    assert min(norms) > 0, norms
    seconds = statistics.median(r[0] for r in results[3:])
    report(
        out,
        setting=name,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        kind=setting.kind,
        keep=setting.keep,
        tokens_per_second=setting.rows * setting.length / seconds,
        step_ms=seconds * 1e3,
        fastest_ms=min(r[0] for r in results[3:]) * 1e3,
        clocks=speed,
        first_step_s=results[0][0],
        build_s=build_seconds,
        held_gib=held / GIB,
        peak_gib=torch.cuda.max_memory_allocated() / GIB,
        loss=losses[-1],
        gradient_norm=norms[-1],
    )
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            step()
        print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


Patch = tuple[object, str, object]
"""An object, the name of an attribute, and what it is instead."""

LEVERS: dict[str, tuple[tuple[Patch, ...], dict[str, float]]] = {
    "as it is": ((), {}),
    "dP and dB apart": (((low_rank, "takes", lambda *_: False),), {"A": 3.0, "E": 2.0, "F": 3.0}),
    "grad pairs of 32 rows": (((low_rank, "ROWS", 32),), {}),
    # An fp8 base only ("levers-F"): predicted against the same without.
    "fp8 products that scale their own rows": (((Fp8Weight, "scales_after", False),), {"F": 20.0}),
    "fp8 gradients summed in fp32": (((Fp8Weight, "fast_gradients", False),), {"F": 20.0}),
    "both, as it was": (((Fp8Weight, "scales_after", False), (Fp8Weight, "fast_gradients", False)), {"F": 40.0}),
    "fp8 rows rounded by passes of their own": (((Fp8Weight, "rounds_early", False),), {"F": 7.5}),
    "fp8 gates in pieces of 1,024 columns": (((rounded_glu, "BLOCK", 1024), (rounded_glu, "WARPS", 4)), {}),
    "fp8 gates in pieces of 4,096 columns": (((rounded_glu, "BLOCK", 4096), (rounded_glu, "WARPS", 16)), {}),
    "logits by 32 warps": (((turn_logits, "TURN_COLUMNS", 8192), (turn_logits, "TURN_WARPS", 32)), {}),
}
"""Ways to run a step that differ by a constant or a kernel: patches, and the milliseconds they should add or take."""


def run_levers(name: str, out: Path | None, *, steps: int, only: str) -> None:
    """Times one model's step under every lever named like `only`, in turn, beside the step before and after them."""
    setting = SETTINGS[name]
    model = build(setting)
    ids = torch.zeros((setting.rows, setting.length), dtype=torch.int64, device="cuda")
    run = training_step(model, ids, graph=False)
    base = 0.0
    tried = [(lever, what) for lever, what in LEVERS.items() if only in lever or lever == "as it is"]
    for lever, (patches, predicted) in [*tried, ("as it is, again", ((), {}))]:
        before = [(target, attribute, getattr(target, attribute)) for target, attribute, _ in patches]
        for target, attribute, value in patches:
            setattr(target, attribute, value)
        try:
            torch.cuda.reset_peak_memory_stats()
            results = [timed_step(run, ids, setting.config["vocab_size"]) for _ in range(steps + 2)][2:]
        except (AssertionError, RuntimeError, ValueError) as error:  # of a kernel that this GPU refuses, for example
            report(out, levers=name, lever=lever, error=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        finally:
            for target, attribute, value in before:
                setattr(target, attribute, value)
        times = [seconds * 1e3 for seconds, _, _ in results]
        step_ms = statistics.median(times)
        base = base or step_ms
        report(
            out,
            levers=name,
            lever=lever,
            step_ms=step_ms,
            fastest_ms=min(times),
            change_ms=step_ms - base,
            predicted_ms=predicted.get(name),
            loss=results[-1][1],
            gradient_norm=results[-1][2],
            peak_gib=torch.cuda.max_memory_allocated() / GIB,
        )


def timed_step(run: Callable[[], tuple[Tensor, Tensor]], ids: Tensor, vocab_size: int) -> tuple[float, float, float]:
    """Seconds, loss and gradient norm of a step on new random tokens."""
    ids.random_(0, vocab_size)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    loss, norm = run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, loss.item(), norm.item()


def clocks() -> str | None:
    """The GPU's clock, power and reasons for slowing down, while it runs what was queued; None without nvidia-smi."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="+", choices=["kernels", "matmuls", *SETTINGS, *(f"levers-{s}" for s in SETTINGS)]
    )
    parser.add_argument("--out", type=Path, help="append results as JSON lines to this file")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--levers", default="", help="try the levers whose name holds this text")
    parser.add_argument("--profile", action="store_true", help="print the time of each GPU kernel of one step")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/engine.py needs a CUDA GPU; there is none here.")
    for what in options.what:
        try:
            if what == "kernels":
                run_kernels(options.out)
            elif what == "matmuls":
                run_matmuls(options.out)
            elif what.startswith("levers-"):
                run_levers(
                    what.removeprefix("levers-"), options.out, steps=max(3, options.steps // 2), only=options.levers
                )
            else:
                run_steps(what, options.out, steps=options.steps, profile=options.profile)
        except (AssertionError, RuntimeError, ValueError) as error:
            # One setting's failure must not cost the others the machine; it is printed as its result.
            report(options.out, setting=what, error=f"{type(error).__name__}: {str(error)[:300]}")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
