"""The same job as its users would do it with Hugging Face: Accelerate with FSDP2, Transformers and PEFT.

One process of it, started by `python -m benchmarks.scaling` through torchrun: `peer.py JOB.json RESULT.json`. The loop
is the plainest that Accelerate documents; gradients are not clipped. Nothing of Stoker is used but the job's files. On
a CPU Accelerate does not shard: there the script runs, and measures its DDP.
"""

import importlib.metadata
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stoker.distributed.ranks import end_process

Job = dict[str, Any]
_PACKAGES = ("accelerate", "transformers", "peft", "torch")


def main(job_path: str, result_path: str) -> None:
    """Runs the job with the other ranks; the first one writes what was measured."""
    job: Job = json.loads(Path(job_path).read_text())
    torch.manual_seed(job["seed"])
    on_gpu = torch.cuda.is_available()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        activation_checkpointing=job["checkpointing"],
    )
    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no", cpu=not on_gpu, fsdp_plugin=plugin)
    start = time.perf_counter()
    model = _load(job, accelerator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=on_gpu)
    model, optimizer = accelerator.prepare(model, optimizer)
    is_sharded = isinstance(model, FSDPModule)
    if on_gpu and not is_sharded:
        raise SystemExit("Accelerate did not shard the model")
    model.train()
    load_seconds = time.perf_counter() - start
    measured = _train(job, accelerator, model, optimizer)
    if accelerator.is_main_process:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
        how = {"checkpointing": job["checkpointing"], "is_sharded": is_sharded}
        Path(result_path).write_text(
            json.dumps({**measured, **how, "load_seconds": load_seconds, "versions": versions})
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _load(job: Job, accelerator: Accelerator) -> Any:
    from transformers import AutoModelForCausalLM

    on_gpu = accelerator.device.type == "cuda"
    adapter = job["adapter"]
    dtype = torch.bfloat16 if on_gpu and adapter else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=adapter["rank"], lora_alpha=adapter["alpha"], target_modules=adapter["targets"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


def _train(job: Job, accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Any]:
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, norm = [], [], math.nan
    for number, micro_batches in enumerate(_steps(job, accelerator)):
        _wait(device)
        start = time.perf_counter()
        total = torch.zeros((), device=device)
        for ids, labels in micro_batches:
            loss = model(input_ids=ids, labels=labels).loss / len(micro_batches)
            accelerator.backward(loss)
            total += loss.detach()
            del loss
        if number == 0:
            norm = _norm(model)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(accelerator.reduce(total, reduction="mean")))
    if not (all(map(math.isfinite, losses)) and norm > 0):
        raise SystemExit(f"losses {losses}, gradient norm {norm}")
    timed = seconds[job["warmup_steps"] :]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "step_seconds": statistics.median(timed),
        "tokens_per_second": job["tokens_per_step"] / statistics.median(timed),
        "peak_bytes": int(max(accelerator.gather(torch.tensor([peak], device=device)).tolist())),
        "losses": losses,
        "gradient_norm": norm,
    }


def _steps(job: Job, accelerator: Accelerator) -> list[list[tuple[Tensor, Tensor]]]:
    """This rank's micro-batches of each step: rows, and labels as Transformers shifts them itself."""
    rows = np.load(job["rows"])
    steps = []
    for ids, targets in zip(rows["input_ids"], rows["targets"], strict=True):  # [rows, T] of a step
        labels = np.full_like(targets, -100)
        labels[:, 1:] = targets[:, :-1]
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        pair = [torch.from_numpy(part[mine]).to(accelerator.device) for part in (ids, labels)]
        steps.append(list(zip(*(part.split(job["micro_batch_size"]) for part in pair), strict=True)))
    return steps


def _norm(model: Any) -> float:
    """Of this rank's parts of all gradients together."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    parts = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
    return float(torch.nn.utils.get_total_norm([part.float() for part in parts]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
    # A process group that DDP is the last to hold may wait, at the interpreter's end, for a thread of its own for good.
    end_process(0)
