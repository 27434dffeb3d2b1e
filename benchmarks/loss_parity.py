"""Loss curves on real text: every way in which Stoker can run a layer, against Transformers + PEFT.

    python -m benchmarks.loss_parity                # writes benchmarks/results/loss_parity_{cpu,gpu}.{csv,json,svg}

The built-in tiny Llama learns the shipped conversations for 300 steps, from the same weights, adapter and batches each
time. A way is compared with its counterpart: plain and fused layers with Transformers in the same precision, NF4 and
int8 with Transformers on the dequantised weights, rungs of the recompute ladder with the layer that keeps all, fp8 with
bf16. Compared are curves smoothed by a moving mean over WINDOW steps (two bf16 runs part step by step, as two seeds do,
but must learn alike); the largest relative difference must stay within the bound stated for it. On a CPU: fp32, plain
PyTorch; Triton's kernels, bf16, fp8 and offload need a GPU.
"""

import argparse
import csv
import importlib.metadata
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if not __package__:  # run as a file: Python then looks in the file's own folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.curves import svg
from benchmarks.main_job import theirs
from stoker import builtin
from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch.activations import LADDER
from stoker.compose.bench.report import commit
from stoker.compose.model import Base, load_decoder, load_tokenizer, open_base
from stoker.compose.run_folder import now, versions
from stoker.data.batch import Batch
from stoker.data.loader import StepLoader
from stoker.data.prepare import SourceOptions, prepare
from stoker.distributed.single import SingleDevice
from stoker.export import adapter
from stoker.kernels.offload import HostOffload
from stoker.nn.frozen_linear import FrozenLinear
from stoker.optim import optimizers
from stoker.quant.fp8_head import in_fp8
from stoker.tasks.supervised import SupervisedTask
from stoker.train.guard import MemoryGuard
from stoker.train.step import take_step

RESULTS = Path(__file__).parent / "results"
LEARNING_RATE = 5e-4
"""Low enough that after 300 steps there is still a loss to compare: at 3e-3 the rows are known by heart by then."""
WINDOW = 20
SAME_NUMBERS = 1e-4
"""fp32 against fp32: sums in another order."""
SAME_PRECISION = 1e-2
"""bf16 against bf16, rounded in other places."""
SAME_ARITHMETIC = 2e-3
"""A rung against keeping all, on a GPU: what is computed again is the same, but for the order of atomic sums."""
FP8 = 5e-3
"""fp8 against bf16: of the mean over all steps. At any time the curves' moving means must be within SAME_PRECISION."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """One way to train, and the name and bound of its counterpart. `trainer`: "stoker" or "hf".

    `weights`: with "hf", the format whose dequantised weights it gets; with "stoker" the format of the base.
    """

    name: str
    trainer: str = "stoker"
    precision: str = "fp32"
    kernels: str = "reference"
    weights: str = "none"
    keep: str | None = None
    offload: bool = False
    counterpart: str = ""
    bound: float = 0.0
    mean_bound: float = math.inf


def ways(device: str) -> list[Way]:
    """Returns what this device can run, counterparts first."""
    return cpu_ways() if device == "cpu" else [*cpu_ways(), *gpu_ways()]


def cpu_ways() -> list[Way]:
    formats = ("nf4", "int8")
    return [
        Way("hf fp32", trainer="hf"),
        Way("reference fp32", counterpart="hf fp32", bound=SAME_NUMBERS),
        *(Way(f"fused fp32, keep {rung}", keep=rung, counterpart="hf fp32", bound=SAME_NUMBERS) for rung in LADDER),
        *(Way(f"hf fp32 on {kind} weights", trainer="hf", weights=kind) for kind in formats),
        *(
            Way(f"{kind} fp32", weights=kind, counterpart=f"hf fp32 on {kind} weights", bound=SAME_NUMBERS)
            for kind in formats
        ),
    ]


def gpu_ways() -> list[Way]:
    formats = ("nf4", "int8")
    bf16 = {"precision": "bf16", "kernels": "triton"}
    whole = Way("triton bf16, keep all", keep="all", counterpart="hf bf16", bound=SAME_PRECISION, **bf16)
    rungs = [
        Way(f"triton bf16, keep {rung}", keep=rung, counterpart=whole.name, bound=SAME_ARITHMETIC, **bf16)
        for rung in LADDER[1:]
    ]
    on_host = Way(
        "triton bf16, keep attention on the host",
        keep="attention",
        offload=True,
        counterpart=whole.name,
        bound=SAME_ARITHMETIC,
        **bf16,
    )
    fp8 = Way(
        "fp8 triton bf16",
        weights="fp8",
        keep="all",
        counterpart=whole.name,
        bound=SAME_PRECISION,
        mean_bound=FP8,
        **bf16,
    )
    return [
        Way("triton fp32", kernels="triton", keep="all", counterpart="hf fp32", bound=SAME_NUMBERS),
        Way("hf bf16", trainer="hf", precision="bf16"),
        Way("reference bf16", precision="bf16", counterpart="hf bf16", bound=SAME_PRECISION),
        whole,
        *rungs,
        on_host,
        *(Way(f"hf bf16 on {kind} weights", trainer="hf", precision="bf16", weights=kind) for kind in formats),
        *(
            Way(
                f"{kind} triton bf16",
                weights=kind,
                keep="attention",
                counterpart=f"hf bf16 on {kind} weights",
                bound=SAME_PRECISION,
                **bf16,
            )
            for kind in formats
        ),
        *([fp8] * has_fp8()),
    ]


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@dataclass(frozen=True)
class Job:
    """What every way starts from."""

    base: Base
    adapter: Path
    batches: tuple[tuple[Batch, ...], ...]
    device: str


def make_job(folder: Path, *, steps: int, device: str, rows: int = 4, length: int = 128) -> Job:
    """Writes an untrained adapter and draws packed batches of the shipped conversations."""
    base = open_base("builtin:tiny-llama")
    decoder = load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")
    add_lora(decoder, rank=16, alpha=32, seed=0)
    adapter.save(decoder, folder, base_name=str(base.folder))
    source = SourceOptions(path=str(builtin.resolve_rows("builtin:fine-tuning")))
    documents = prepare([source], tokenizer=load_tokenizer(base), sequence_length=length)
    loader = StepLoader(documents, batch_size=rows, micro_batch_size=rows, sequence_length=length, packing=True, seed=0)
    return Job(base, folder, tuple(tuple(loader.step(index)) for index in range(steps)), device)


def run_stoker(way: Way, job: Job) -> list[float]:
    """Returns the loss of each step."""
    decoder = load_decoder(
        job.base,
        device=job.device,
        dtype=_DTYPES[way.precision],
        kernels=way.kernels,
        quantization=way.weights,
    )
    if way.weights == "fp8":  # as a run has it where memory is left
        decoder.rounded_head = in_fp8(decoder.head_weight, decoder.final_norm.weight)
        assert decoder.rounded_head is not None, "fp8 moves the head's logits too far"
    adapter.load(decoder, job.adapter)
    if way.keep is not None:
        # Every tensor goes to the host, as small as these are.
        offload = HostOffload(min_bytes=1) if way.offload else None
        fuse_blocks(decoder, keep=way.keep, implementation=way.kernels, offload=offload)
    strategy = SingleDevice(job.device, precision=way.precision)
    strategy.prepare(
        SupervisedTask(decoder, kernels=way.kernels),
        lambda named: optimizers.build(list(named), kind="adamw", learning_rate=LEARNING_RATE),
    )
    guard = MemoryGuard(strategy, print)
    losses = []
    for number, batches in enumerate(job.batches, start=1):
        outcome = take_step(
            strategy,
            batches,
            number=number,
            learning_rate=LEARNING_RATE,
            max_gradient_norm=1.0,
            guard=guard,
            notify=print,
        )
        assert outcome.gradient_norm > 0, f"{way.name}: no gradient in step {number}"
        losses.append(outcome.loss)
    return losses


def run_hf(way: Way, job: Job) -> list[float]:
    """Returns the loss of each step of the plain loop over Transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job.base.folder, dtype=_DTYPES[way.precision], attn_implementation="sdpa"
    ).to(job.device)
    model.config.use_cache = False
    if way.weights != "none":
        put_dequantized(model, job, way.weights, way.precision)
    model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses = []
    for batches in job.batches:
        count, total = sum(one.num_trained_tokens for one in batches), 0.0
        for batch in batches:
            arrays = {name: torch.from_numpy(value).to(job.device) for name, value in theirs(batch).items()}
            targets = arrays.pop("targets")
            with torch.autocast(job.device, dtype=_DTYPES[way.precision], enabled=way.precision != "fp32"):
                logits = model(**arrays).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total / count)
    return losses


def put_dequantized(model: torch.nn.Module, job: Job, kind: str, precision: str) -> None:
    """Gives Transformers' model the values that our quantised layers stand for."""
    decoder = load_decoder(
        job.base, device=job.device, dtype=_DTYPES[precision], kernels="reference", quantization=kind
    )
    for layer in decoder.modules():
        if isinstance(layer, FrozenLinear):
            whole: Tensor = layer.weight
            for name, rows in zip(layer.names, layer.slices, strict=True):
                with torch.no_grad():
                    model.get_parameter(f"{name}.weight").copy_(whole[rows])


def smoothed(losses: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Moving means over `window` steps; over all of them when there are fewer."""
    window = min(window, len(losses))
    return np.convolve(losses, np.full(window, 1.0 / window), mode="valid")


def difference(losses: Sequence[float], counterpart: Sequence[float]) -> float:
    """The largest relative difference of the smoothed curves."""
    ours, other = smoothed(losses), smoothed(counterpart)
    return float(np.max(np.abs(ours - other) / other))


def mean_difference(losses: Sequence[float], counterpart: Sequence[float]) -> float:
    """The relative difference of the means over all steps."""
    return abs(float(np.mean(losses) / np.mean(counterpart)) - 1.0)


Found = tuple[dict[str, list[float]], list[dict]]
"""The curves so far, and a line for each comparison."""


def run(way: Way, job: Job) -> tuple[list[float], float]:
    """Returns the losses of one way, and the seconds that it took."""
    torch.manual_seed(0)
    start = time.perf_counter()
    losses = {"stoker": run_stoker, "hf": run_hf}[way.trainer](way, job)
    return losses, time.perf_counter() - start


def runs(
    job: Job, chosen: Sequence[Way], *, end: float, num_processes: int
) -> Iterator[tuple[Way, tuple[list[float], float] | None]]:
    """Yields each way with its result, or None where it could not begin (or, side by side, end) before `end`."""
    if num_processes == 1:
        for way in chosen:
            yield way, (run(way, job) if time.monotonic() < end else None)
        return
    pool = ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        found = [(way, pool.submit(run, way, job)) for way in chosen]
        for way, result in found:
            try:
                yield way, result.result(timeout=max(0.0, end - time.monotonic()) if end < math.inf else None)
            except TimeoutError:
                yield way, None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compared(way: Way, curves: dict[str, list[float]]) -> dict:
    """Returns a line about a way's curve and that of its counterpart."""
    pair = curves[way.name], curves[way.counterpart]
    found, mean = difference(*pair), mean_difference(*pair)
    return {
        "way": way.name,
        "counterpart": way.counterpart,
        "difference": found,
        "bound": way.bound,
        "mean_difference": mean,
        "mean_bound": way.mean_bound if way.mean_bound < math.inf else None,
        "is_within": bool(found <= way.bound and mean <= way.mean_bound),
    }


def compare(
    job: Job,
    chosen: Sequence[Way],
    *,
    budget_seconds: float = math.inf,
    num_processes: int = 1,
    keep: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Runs every way that the budget allows and whose counterpart ran; `keep` gets what is there after each.

    With `num_processes`, as many at a time, each in a process of its own: steps of a small model wait for Python, not
    for the GPU. Returns the curves and a line for each comparison.
    """
    curves: dict[str, list[float]] = {}
    lines: list[dict] = []
    end = time.monotonic() + budget_seconds
    for way, result in runs(job, chosen, end=end, num_processes=num_processes):
        if result is None or (way.counterpart and way.counterpart not in curves):
            print(f"{way.name:<44} is left out: the time is used up", flush=True)
            continue
        curves[way.name], seconds = result
        text = f"{way.name:<44} {curves[way.name][0]:.4f} -> {smoothed(curves[way.name])[-1]:.4f}"
        if way.counterpart:
            line = compared(way, curves)
            lines.append(line)
            text += f"  differs by {line['difference']:.2e} from {way.counterpart} (bound {way.bound:.0e})"
            if way.mean_bound < math.inf:
                text += f", in the mean by {line['mean_difference']:.2e} ({way.mean_bound:.0e})"
            text += "" if line["is_within"] else "  TOO FAR"
        print(f"{text}  [{seconds:.0f} s]", flush=True)
        keep((curves, lines))
    return curves, lines


def write(curves: dict[str, list[float]], lines: list[dict], device: str, results: Path, noted: str | None) -> None:
    """Writes curves as CSV and picture, and what was compared as JSON with versions, device and commit."""
    results.mkdir(parents=True, exist_ok=True)
    stem = "loss_parity_cpu" if device == "cpu" else "loss_parity_gpu"
    with (results / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        for step, losses in enumerate(zip(*curves.values(), strict=True), start=1):
            writer.writerow([step, *(f"{loss:.6f}" for loss in losses)])
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "commit": noted or commit(),
        "date": now(),
        "versions": versions() | {"peft": importlib.metadata.version("peft")},
        "window": WINDOW,
        "comparisons": lines,
    }
    (results / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")
    means = {name: smoothed(losses).tolist() for name, losses in curves.items()}
    (results / f"{stem}.svg").write_text(svg(means, title=f"Loss, mean over {WINDOW} steps ({facts['device']})"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", help="run the ways whose name holds this text, and their counterparts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no other way begins")
    parser.add_argument("--processes", type=int, default=1, help="ways that run at a time")
    parser.add_argument("--commit", help="commit to note, where there is no git")
    options = parser.parse_args()
    chosen = ways(options.device)
    if options.only:
        wanted = {way.name for way in chosen if options.only in way.name}
        known = {way.name: way for way in chosen}
        for name in list(wanted):
            while name := known[name].counterpart:
                wanted.add(name)
        chosen = [way for way in chosen if way.name in wanted]
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), steps=options.steps, device=options.device)
        curves, lines = compare(
            job,
            chosen,
            budget_seconds=options.budget,
            num_processes=options.processes,
            keep=lambda found: write(*found, options.device, options.results, options.commit),
        )
    far = [line["way"] for line in lines if not line["is_within"]]
    if far:
        print(f"too far from their counterparts: {', '.join(far)}", file=sys.stderr)
    return 1 if far or len(curves) < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
