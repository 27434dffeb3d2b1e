"""State spaces on one GPU: exactness and speed of their kernels at full size, and whole LoRA training steps.

    PYTHONPATH=src python benchmarks/state_space.py OUT errors kernels tiles 130M 780M [--profile] [--steps 8]

Needs a CUDA GPU and PyTorch with Triton; no download: weights and tokens are random. `errors` compares every output and
gradient of each kernel in bf16 with the truth in fp64, beside the reference's error in bf16; `kernels` times forward
and backward at the shapes of Mamba 130M and Mamba-2 780M, 4 x 2048 tokens; `tiles` does so under other tile sizes. A
model trains LoRA of rank 16 on its default targets; `-graph` replays the step as one CUDA graph. Before a step's number
is printed, a small model's loss and gradients must equal those of the references, the step's own loss must be finite
and its gradient norm above zero. Results go to OUT/state_space.jsonl, profiles to OUT/profile-NAME.txt.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if not __package__:  # run as a file: Python then looks in the file's own folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import (
    BF16,
    GIB,
    clocks,
    copy_bandwidth,
    loss_of,
    milliseconds,
    report,
    timed_step,
    training_step,
)
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.kernels import (
    causal_conv,
    chunked_scan,
    chunked_scan_backward,
    chunked_scan_forward,
    gated_norm,
    selective_scan,
    selective_scan_forward,
)
from stoker.models import native
from stoker.nn import mamba1, mamba2
from stoker.nn.decoder import Decoder

ROWS, LENGTH = 4, 2048
MAMBA_130M = {
    "model_type": "mamba",
    "vocab_size": 50280,
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_hidden_layers": 24,
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": 48,
    "tie_word_embeddings": True,
}
MAMBA2_780M = {
    "model_type": "mamba2",
    "vocab_size": 50288,
    "hidden_size": 1536,
    "num_hidden_layers": 48,
    "num_heads": 48,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 1,
    "conv_kernel": 4,
    "expand": 2,
    "tie_word_embeddings": True,
}
SMALL = {
    "mamba": {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
    "mamba2": {"vocab_size": 512, "hidden_size": 256, "num_heads": 8, "num_hidden_layers": 2},
}


@dataclass(frozen=True)
class Setting:
    """One training step: the model, and whether it is replayed as a CUDA graph, its layers are recomputed whole, or
    mixers keep what they otherwise run again in the backward."""

    config: dict
    graph: bool = False
    recompute: bool = False
    keep: bool = False


SETTINGS = {
    "130M": Setting(MAMBA_130M),
    "130M-graph": Setting(MAMBA_130M, graph=True),
    "130M-keep": Setting(MAMBA_130M, keep=True),
    "130M-keep-graph": Setting(MAMBA_130M, keep=True, graph=True),
    "130M-recompute": Setting(MAMBA_130M, recompute=True),
    "780M": Setting(MAMBA2_780M),
    "780M-graph": Setting(MAMBA2_780M, graph=True),
    "780M-keep": Setting(MAMBA2_780M, keep=True),
    "780M-recompute": Setting(MAMBA2_780M, recompute=True),
}

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An operation of one layer: what runs it, its inputs in fp64, the names of those that LoRA trains through, and
    the bytes and multiply-adds (as two operations) of a forward and a backward pass."""

    run: Callable[[str, tuple | None], Op]
    inputs: dict[str, Tensor]
    through: tuple[str, ...]
    forward: tuple[float, float]
    backward: tuple[float, float]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float64) * scale


def steps_before_bias(*shape: int) -> Tensor:
    """A model's: softplus of them and a bias of about -4 gives a thousandth to a tenth."""
    return draw(*shape, scale=0.5)


def cases(rows: int, length: int) -> dict[str, Case]:
    """The operations of both models' layers at their full width."""
    tokens = rows * length
    unit = tokens * 2  # bytes of one channel in bf16
    inner, state = 1536, 16
    heads, channels, states = 48, 64, 128
    width, joined = heads * channels, heads * channels + 2 * states
    chunk = chunked_scan_forward.MAX_CHUNK
    once = 2.0 * tokens * heads
    return {
        "selective_scan 130M": Case(
            lambda kind, documents: (
                lambda x, dt, A, B, C, D, z, bias: selective_scan.selective_scan(
                    x, dt, A, B, C, D=D, z=z, dt_bias=bias, document_lengths=documents, implementation=kind
                )[0]
            ),
            {
                "x": draw(rows, length, inner),
                "dt": steps_before_bias(rows, length, inner),
                "A": -torch.arange(1.0, state + 1, device="cuda", dtype=torch.float64).expand(inner, -1),
                "B": draw(rows, length, state),
                "C": draw(rows, length, state),
                "D": draw(inner),
                "z": draw(rows, length, inner),
                "bias": draw(inner) - 4,
            },
            ("x", "dt", "B", "C", "z"),
            (4 * inner * unit, 2.0 * 3 * tokens * inner * state),
            (7 * inner * unit, 2.0 * 10 * tokens * inner * state),
        ),
        "chunked_scan 780M": Case(
            lambda kind, documents: (
                lambda x, dt, A, B, C, D, bias: chunked_scan.chunked_scan(
                    x, dt, A, B, C, D=D, dt_bias=bias, document_lengths=documents, implementation=kind
                )[0]
            ),
            {
                "x": draw(rows, length, heads, channels),
                "dt": steps_before_bias(rows, length, heads),
                "A": -torch.linspace(1, 16, heads, device="cuda", dtype=torch.float64),
                "B": draw(rows, length, 1, states),
                "C": draw(rows, length, 1, states),
                "D": draw(heads),
                "bias": draw(heads) - 4,
            },
            ("x", "dt", "B", "C"),
            ((2 * width + 2 * states) * unit, once * (chunk * (states + channels) + 2 * channels * states)),
            (
                (3 * width + 4 * states) * unit,
                once * (chunk * (3 * states + 3 * channels) + 6 * channels * states),
            ),
        ),
        "causal_conv 780M": Case(
            lambda kind, documents: (
                lambda x, weight, bias: causal_conv.causal_conv(
                    x, weight, bias, document_lengths=documents, implementation=kind
                )
            ),
            {"x": draw(rows, length, joined), "weight": draw(joined, 4, scale=0.5), "bias": draw(joined)},
            ("x",),
            (2 * joined * unit, 8.0 * tokens * joined),
            (3 * joined * unit, 40.0 * tokens * joined),
        ),
        "gated_norm 780M": Case(
            lambda kind, _: lambda y, z, weight: gated_norm.gated_rms_norm(y, z, weight, 1e-5, implementation=kind),
            {"y": draw(rows, length, width), "z": draw(rows, length, width), "weight": draw(width)},
            ("y", "z"),
            (3 * width * unit, 4.0 * tokens * width),
            (5 * width * unit, 10.0 * tokens * width),
        ),
    }


STAYS_WIDE = ("A", "D", "bias")


def results_of(op: Op, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of all inputs; what a model keeps in fp32 is at least that wide."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [v.to(wide if n in STAYS_WIDE else dtype).detach().requires_grad_() for n, v in inputs.items()]
    out = op(*leaves)
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device="cuda", dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def run_errors(out: Path) -> None:
    """Errors against fp64 of values that bf16 holds exactly; whole rows, and rows packed with documents."""
    packed = ((1, 700, 323), (512, 512))
    for name, case in cases(2, 1024).items():
        inputs = {n: v.to(torch.float32 if n in STAYS_WIDE else BF16).double() for n, v in case.inputs.items()}
        for documents in (None, packed):
            truth = results_of(case.run("reference", documents), inputs, torch.float64)
            for dtype in (torch.float32, BF16, torch.float16):
                eager = results_of(case.run("reference", documents), inputs, dtype)
                kernel = results_of(case.run("triton", documents), inputs, dtype)
                again = results_of(case.run("triton", documents), inputs, dtype)
                lines = {}
                for what, true, plain, ours in zip(("out", *inputs), truth, eager, kernel, strict=True):
                    size = true.norm().item()
                    errors = [((v.double() - true).norm() / size).item() for v in (plain, ours)]
                    lines[what] = [float(f"{error:.2e}") for error in errors]
                report(
                    out,
                    errors=name,
                    packed=documents is not None,
                    dtype=str(dtype).removeprefix("torch."),
                    same_bits_twice=all(torch.equal(a, b) for a, b in zip(kernel, again, strict=True)),
                    worst_ratio=max(ours / max(plain, 1e-7) for plain, ours in lines.values()),
                    reference_and_kernel=lines,
                )
                del eager, kernel, again
            del truth
            torch.cuda.empty_cache()


def times_of(op: Op, case: Case) -> tuple[float, float, float]:
    """Milliseconds of a forward, a backward, and GiB that one of each takes above its inputs."""
    leaves = []
    for name, value in case.inputs.items():
        leaf = value.to(torch.float32 if name in STAYS_WIDE else BF16)
        leaves.append(leaf.requires_grad_(name in case.through))
    grads = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.no_grad():
        forward = milliseconds(lambda: op(*leaves))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = op(*leaves)
    grad = torch.randn_like(result)
    torch.autograd.grad(result, grads, grad, retain_graph=True)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    backward = milliseconds(lambda: torch.autograd.grad(result, grads, grad, retain_graph=True))
    return forward, backward, peak


def run_kernels(out: Path) -> None:
    bandwidth = copy_bandwidth()
    report(out, kernel="copy of 512 MiB", gigabytes_per_second=bandwidth)
    for name, case in cases(ROWS, LENGTH).items():
        for packed in (False, True):
            documents = ((700, 1000, 348),) * ROWS if packed else None
            forward, backward, peak = times_of(case.run("triton", documents), case)
            values = {"forward": (forward, *case.forward), "backward": (backward, *case.backward)}
            for direction, (time_ms, size, operations) in values.items():
                rate = size / time_ms / 1e6
                report(
                    out,
                    kernel=f"{name} {direction}",
                    packed=packed,
                    triton_ms=time_ms,
                    gigabytes_per_second=rate,
                    share_of_copy=rate / bandwidth,
                    teraflops=operations / time_ms / 1e9,
                    peak_gib=peak,
                )
        if name.startswith(("causal", "gated")):  # the scans' references would take seconds and all memory
            forward, backward, _ = times_of(case.run("reference", None), case)
            report(out, kernel=name, reference_forward_ms=forward, reference_backward_ms=backward)
        torch.cuda.empty_cache()


Patches = tuple[tuple[object, str, object], ...]

_SCAN, _FORWARD, _BACKWARD = selective_scan_forward, chunked_scan_forward, chunked_scan_backward


def scan_tile(chunk: int, channels: int, neighbours: int, warps: int) -> Patches:
    sizes = {"CHUNK": chunk, "CHANNELS": channels, "NEIGHBOURS": neighbours, "WARPS": warps}
    return tuple((_SCAN, name, value) for name, value in sizes.items())


TILES: dict[str, dict[str, Patches]] = {
    "selective_scan 130M": {
        f"chunk {c}, {e} channels, {n} a thread, {w} warps": scan_tile(c, e, n, w)
        for c, e, n, w in [
            (16, 64, 2, 1),
            (8, 64, 2, 1),
            (8, 128, 4, 1),
        ]
    },
    "chunked_scan 780M": {
        "as it is": (),
        "8 warps backward": ((_BACKWARD, "WARPS", 8),),
        "two stages": ((_FORWARD, "STAGES", 2), (_BACKWARD, "STAGES", 2)),
        "four stages": ((_FORWARD, "STAGES", 4), (_BACKWARD, "STAGES", 4)),
        "128 states a tile": ((_FORWARD, "MAX_STATES", 128),),
        "128 states a tile, 8 warps backward": ((_FORWARD, "MAX_STATES", 128), (_BACKWARD, "WARPS", 8)),
        "8 heads a program": ((_BACKWARD, "HEADS_PER_PROGRAM", 8),),
        "24 heads a program": ((_BACKWARD, "HEADS_PER_PROGRAM", 24),),
    },
    "causal_conv 780M": {
        f"{rows} rows, {forward} and {backward} channels, {warps} warps": (
            (causal_conv, "ROWS", rows),
            (causal_conv, "FORWARD_CHANNELS", forward),
            (causal_conv, "BACKWARD_CHANNELS", backward),
            (causal_conv, "WARPS", warps),
        )
        for rows, forward, backward, warps in [(16, 128, 64, 4), (8, 256, 64, 4), (16, 64, 32, 2), (8, 128, 64, 2)]
    },
    "gated_norm 780M": {
        f"{warps} warps": ((gated_norm, "_num_warps", lambda _, warps=warps: warps),) for warps in (4, 8, 16)
    },
}


def gpu_kernels(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each GPU kernel of one call, the longest first."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:40]: round(event.self_device_time_total / 1e3, 4) for event in events[:8]}


def run_tiles(out: Path) -> None:
    for name, choices in TILES.items():
        case = cases(ROWS, LENGTH)[name]
        for tile, patches in choices.items():
            before = [(target, attribute, getattr(target, attribute)) for target, attribute, _ in patches]
            for target, attribute, value in patches:
                setattr(target, attribute, value)
            try:
                op = case.run("triton", None)
                forward, backward, _ = times_of(op, case)
                leaves = {n: v.to(torch.float32 if n in STAYS_WIDE else BF16) for n, v in case.inputs.items()}
                leaves = [v.requires_grad_(n in case.through) for n, v in leaves.items()]
                result = op(*leaves)
                trained = [leaf for leaf in leaves if leaf.requires_grad]
                parts = gpu_kernels(lambda r=result, t=trained: torch.autograd.grad(r.sum(), t, retain_graph=True))
                parts |= gpu_kernels(lambda op=op, v=leaves: op(*v))
                report(out, tiles=name, tile=tile, forward_ms=forward, backward_ms=backward, kernels_ms=parts)
            except Exception as error:  # noqa: BLE001 - one tile that does not fit must not cost the others
                report(out, tiles=name, tile=tile, error=f"{type(error).__name__}: {str(error)[:200]}")
            finally:
                for target, attribute, value in before:
                    setattr(target, attribute, value)
        torch.cuda.empty_cache()


def call(function: Callable[..., Tensor], *arguments: object, **_: object) -> Tensor:
    """In place of `checkpoint`: runs `function` and keeps what it saves."""
    return function(*arguments)


def build(setting: Setting, *, kernels: str = "triton") -> Decoder:
    spec = read(setting.config, "benchmark")
    model = native.build(spec, device="cuda", dtype=BF16, kernels=kernels)
    add_lora(model, rank=16, alpha=16)
    for block in model.blocks:
        block.recompute = setting.recompute
    for module in (mamba1, mamba2):
        module.checkpoint = call if setting.keep else checkpoint
    return model


def check_parity(setting: Setting) -> None:
    """A small model's loss and adapter gradients against those of the references; raises AssertionError."""
    small = replace(setting, config=setting.config | SMALL[setting.config["model_type"]])
    ids = torch.randint(0, 512, (2, 300), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    results = []
    for kernels in ("reference", "triton"):
        model = build(small, kernels=kernels)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_b" in name:
                generator = torch.Generator("cuda").manual_seed(index)
                parameter.data.normal_(0.0, 0.02, generator=generator)
        loss = loss_of(model, ids, kernels=kernels)
        loss.backward()
        results.append((loss.item(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (kernel_loss, kernel_grads) = results
    assert abs(loss - kernel_loss) < 2e-3 * loss, f"loss {kernel_loss} instead of {loss}"
    assert grads.keys() == kernel_grads.keys()
    worst = max(((kernel_grads[n] - g).norm() / g.norm()).item() for n, g in grads.items())
    assert worst < 5e-2, f"a gradient differs by {worst:.2g} of its norm"  # two bf16 results, each some 1e-2 off


def run_steps(name: str, out: Path, *, steps: int, profile: Path | None) -> None:
    setting = SETTINGS[name]
    check_parity(setting)
    gc.collect()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    model = build(setting)
    torch.cuda.synchronize()
    build_seconds, held = time.perf_counter() - start, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.zeros((ROWS, LENGTH), dtype=torch.int64, device="cuda")
    start = time.perf_counter()
    run = training_step(model, ids, graph=setting.graph)
    capture_seconds = time.perf_counter() - start
    results = [timed_step(run, ids, setting.config["vocab_size"]) for _ in range(steps + 3)]
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
        triton=triton.__version__,
        tokens_per_second=ROWS * LENGTH / seconds,
        step_ms=seconds * 1e3,
        fastest_ms=min(r[0] for r in results[3:]) * 1e3,
        clocks=speed,
        first_step_s=results[0][0] + capture_seconds,
        build_s=build_seconds,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        held_gib=held / GIB,
        peak_gib=torch.cuda.max_memory_allocated() / GIB,
        loss=losses[-1],
        gradient_norm=norms[-1],
    )
    if profile is not None:
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as recorded:
            timed_step(run, ids, setting.config["vocab_size"])
        averages = recorded.key_averages()
        table = averages.table(sort_by="self_cuda_time_total", row_limit=50, max_name_column_width=90)
        profile.write_text(table + averages.table(sort_by="self_cpu_time_total", row_limit=30))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("what", nargs="+", choices=["errors", "kernels", "tiles", *SETTINGS])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="write the times of each kernel of one step")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/state_space.py needs a CUDA GPU; there is none here.")
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "state_space.jsonl"
    torch.manual_seed(0)
    parts = {"errors": run_errors, "kernels": run_kernels, "tiles": run_tiles}
    for what in options.what:
        try:
            if what in parts:
                parts[what](lines)
            else:
                profile = options.out / f"profile-{what}.txt" if options.profile else None
                run_steps(what, lines, steps=options.steps, profile=profile)
        except (AssertionError, RuntimeError, ValueError) as error:
            # One part's failure must not cost the others the machine; it is printed as its result.
            report(lines, part=what, error=f"{type(error).__name__}: {str(error)[:500]}")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
