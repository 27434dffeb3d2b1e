"""The main job against Transformers + PEFT on this machine: tokens/s, peak memory and losses, in one run.

    python -m benchmarks.main_job            # writes benchmarks/results/main_job.{csv,json}

Both sides start from the same weights and the same adapter and take the same batches with the same number of threads,
each in a process of its own, so that peak memory is its own. Processes take turns (ours, theirs, ours, ...), and the
ratio of speeds is the median of those of neighbours, because the clock of a shared machine drifts. Stoker's side is its
own Trainer; the other is the plain loop in baseline.py.
Before a figure is printed, the losses of the first 20 steps must agree to 1e-4 and the gradient norm be above zero.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
LEARNING_RATE = 3e-3
LOSS_TOLERANCE = 1e-4
COMPARED_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.job:
        run_ours(json.loads(Path(chosen.job).read_text()))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("padded", "packed"):
            job = make_job(Path(folder) / layout, layout, steps=chosen.steps, num_threads=chosen.threads)
            rows.append(compare(job, layout, repeats=chosen.repeats))
    report(rows, chosen.threads)


def make_job(folder: Path, layout: str, *, steps: int, num_threads: int) -> Path:
    """Writes a model, an untrained adapter and the batches of every step; returns the file that names them."""
    import torch

    from stoker import builtin
    from stoker.adapters.lora import add_lora
    from stoker.compose.model import load_decoder, load_tokenizer, open_base
    from stoker.data.prepare import SourceOptions, prepare
    from stoker.export import adapter

    base = open_base("builtin:tiny-llama")
    decoder = load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")
    add_lora(decoder, rank=32, alpha=64, seed=0)
    adapter.save(decoder, folder / "adapter", base_name=str(base.folder))
    rows = prepare(
        [SourceOptions(path=str(builtin.resolve_rows("builtin:fine-tuning")))],
        tokenizer=load_tokenizer(base),
        sequence_length=128,
    )
    loader = make_loader(rows, layout)
    (folder / "batches").mkdir()
    np.savez(folder / "rows.npz", ids=rows.ids, trained=rows.trained, offsets=rows.offsets)
    for step in range(steps):
        batches = loader.step(step)
        arrays = {"count": np.array(len(batches)), "tokens": np.array(sum(batch.num_tokens for batch in batches))}
        for index, batch in enumerate(batches):
            arrays |= {f"{name}_{index}": value for name, value in theirs(batch).items()}
        np.savez(folder / "batches" / f"{step}.npz", **arrays)
    job = {
        "model": str(base.folder),
        "adapter": str(folder / "adapter"),
        "batches": str(folder / "batches"),
        "rows": str(folder / "rows.npz"),
        "layout": layout,
        "steps": steps,
        "warmup_steps": 5,
        "learning_rate": LEARNING_RATE,
        "num_threads": num_threads,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def make_loader(rows, layout: str):
    """The quickstart's batches: 4 packed rows of 128 tokens, or as many unpacked rows as hold about as much."""
    from stoker.data.loader import StepLoader

    size = 4 if layout == "packed" else 12
    return StepLoader(
        rows, batch_size=size, micro_batch_size=size, sequence_length=128, packing=layout == "packed", seed=0
    )


def theirs(batch) -> dict[str, np.ndarray]:
    """A batch as Transformers takes it: a padding mask, or for packed rows positions that restart (it then masks)."""
    ids = batch.input_ids.numpy()
    arrays = {"input_ids": ids, "targets": batch.targets.numpy()}
    width = ids.shape[1]
    if batch.document_lengths is not None:
        rows = [np.concatenate([np.arange(length) for length in row]) for row in batch.document_lengths]
        return arrays | {"position_ids": np.stack(rows)}
    mask = np.arange(width)[None] < np.array(batch.row_tokens)[:, None]
    return arrays | {"attention_mask": mask.astype(np.int64)}


def run_ours(job: dict) -> None:
    """The job through Stoker's own trainer; prints one RESULT line."""
    import torch

    from stoker.compose.model import load_decoder, open_base
    from stoker.data.audit import Audit
    from stoker.data.prepared import Prepared
    from stoker.distributed.single import SingleDevice
    from stoker.export import adapter
    from stoker.observe.events import StepLogged
    from stoker.optim import optimizers
    from stoker.tasks.supervised import SupervisedTask
    from stoker.train.loop import Trainer
    from stoker.train.settings import Settings

    torch.set_num_threads(job["num_threads"])
    base = open_base(job["model"])
    decoder = load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")
    adapter.load(decoder, Path(job["adapter"]))
    strategy = SingleDevice("cpu")
    strategy.prepare(
        SupervisedTask(decoder),
        lambda named: optimizers.build(list(named), kind="adamw", learning_rate=LEARNING_RATE, betas=(0.9, 0.95)),
    )
    after_load = peak_bytes()
    arrays = np.load(job["rows"])
    rows = Prepared(arrays["ids"], arrays["trained"], arrays["offsets"], Audit())
    events: list[StepLogged] = []

    class Keep:
        def handle(self, event) -> None:
            if isinstance(event, StepLogged):
                events.append(event)

        def close(self) -> None:
            pass

    settings = Settings(job["steps"], LEARNING_RATE, schedule=lambda index: 1.0)
    Trainer(strategy, make_loader(rows, job["layout"]), settings=settings, observers=[Keep()]).run()
    speeds = [event.num_tokens / event.seconds for event in events[job["warmup_steps"] :]]
    result = {
        "losses": [event.loss for event in events],
        "gradient_norms": [event.gradient_norm for event in events],
        "tokens_per_second": statistics.median(speeds),
        "peak_bytes": peak_bytes(),
        "after_load_bytes": after_load,
    }
    print("RESULT", json.dumps(result))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(job: Path, layout: str, *, repeats: int) -> dict:
    """Runs both sides in turns; raises unless their losses agree; returns medians and ratios."""
    ours, baseline = [], []
    for _ in range(repeats):
        ours.append(run("-m", "benchmarks.main_job", "--job", str(job)))
        baseline.append(run("benchmarks/baseline.py", str(job)))
    pairs = zip(ours[0]["losses"][:COMPARED_STEPS], baseline[0]["losses"][:COMPARED_STEPS], strict=True)
    difference = max(abs(left - right) for left, right in pairs)
    if not difference <= LOSS_TOLERANCE:
        raise SystemExit(f"{layout}: the losses differ by {difference:.2e} within {COMPARED_STEPS} steps")
    if not min(ours[0]["gradient_norms"]) > 0:
        raise SystemExit(f"{layout}: a gradient norm is not above zero")

    def median(results, key):
        return statistics.median(result[key] for result in results)

    speed, their_speed = median(ours, "tokens_per_second"), median(baseline, "tokens_per_second")
    # Of neighbours in time: the clock of a shared machine drifts by more than the two sides differ.
    ratios = [
        left["tokens_per_second"] / right["tokens_per_second"] for left, right in zip(ours, baseline, strict=True)
    ]
    peak, their_peak = median(ours, "peak_bytes"), median(baseline, "peak_bytes")
    return {
        "layout": layout,
        "stoker_tokens_per_second": round(speed),
        "baseline_tokens_per_second": round(their_speed),
        "speed_ratio": round(statistics.median(ratios), 3),
        "stoker_peak_mib": round(peak / 2**20, 1),
        "baseline_peak_mib": round(their_peak / 2**20, 1),
        "memory_ratio": round(peak / their_peak, 3),
        "stoker_job_mib": round((peak - median(ours, "after_load_bytes")) / 2**20, 1),
        "baseline_job_mib": round((their_peak - median(baseline, "after_load_bytes")) / 2**20, 1),
        "max_loss_difference": float(f"{difference:.3g}"),
    }


def run(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def report(rows: list[dict], num_threads: int) -> None:
    """Prints the table and writes it with versions, device and commit."""
    import importlib.metadata
    import platform

    from stoker.compose.run_folder import versions

    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "main_job.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {
        "device": f"CPU, {platform.machine()}, {num_threads} threads",
        "commit": commit.stdout.strip(),
        "versions": {name: value for name, value in versions().items() if name != "platform"}
        | {"peft": importlib.metadata.version("peft")},
        "rows": rows,
    }
    (RESULTS / "main_job.json").write_text(json.dumps(facts, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['layout']}: {row['stoker_tokens_per_second']:,} tokens/s against "
            f"{row['baseline_tokens_per_second']:,} ({row['speed_ratio']:.2f} x), peak {row['stoker_peak_mib']:,.0f} "
            f"against {row['baseline_peak_mib']:,.0f} MiB ({row['memory_ratio']:.2f} x), "
            f"losses within {row['max_loss_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
