"""The job of `benchmarks/main_job.py` through Transformers and PEFT: own loop, given batches, one JSON line of results.

Run by main_job.py as a process of its own, so that its peak memory is its own:
    python benchmarks/baseline.py JOB.json
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    torch.set_num_threads(job["num_threads"])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    model.train()
    model.config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    after_load = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses, seconds, tokens = [], [], []
    for step in range(job["steps"]):
        arrays = np.load(Path(job["batches"]) / f"{step}.npz")
        micro_batches = [_batch(arrays, index) for index in range(int(arrays["count"]))]
        started = time.perf_counter()
        losses.append(train_step(model, optimizer, trained, micro_batches))
        seconds.append(time.perf_counter() - started)
        tokens.append(int(arrays["tokens"]))
    warm = job["warmup_steps"]
    speed = statistics.median(count / time_ for count, time_ in zip(tokens[warm:], seconds[warm:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"losses": losses, "tokens_per_second": speed, "peak_bytes": peak, "after_load_bytes": after_load}
    print("RESULT", json.dumps(result))


def _batch(arrays: "np.lib.npyio.NpzFile", index: int) -> dict[str, torch.Tensor]:
    """The model's inputs and the targets of one micro-batch: padded rows have a mask, packed ones positions."""
    names = [name.removesuffix(f"_{index}") for name in arrays.files if name.endswith(f"_{index}")]
    return {name: torch.from_numpy(arrays[f"{name}_{index}"]) for name in names}


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, trained: list, micro_batches: list) -> float:
    """One step of gradient accumulation whose loss is the mean over all trained tokens of the step."""
    count = sum(int((batch["targets"] != -100).sum()) for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        targets = batch.pop("targets")
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        (loss / count).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / count


if __name__ == "__main__":
    main(sys.argv[1])
