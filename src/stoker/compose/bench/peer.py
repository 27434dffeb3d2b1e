"""Another trainer's loop, run as a process: `python -m stoker.compose.bench.peer NAME JOB.json RESULT.json`.

NAME is hf (Transformers + PEFT), liger (the same with Liger's kernels) or unsloth. The loop is the plainest that each
documents: forward with labels, backward, AdamW; gradients are not clipped, and their norm is looked at only after the
first step, which is not timed. Nothing of Stoker is used but the job's files.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def main(name: str, job_path: str, result_path: str) -> None:
    """Runs the job and writes what was measured."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    job: Job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    start = time.perf_counter()
    model, packages = load(name, job)
    import torch

    torch.set_num_threads(job["num_threads"])
    load_seconds = time.perf_counter() - start
    result = train(name, model, job)
    versions = [_version(package) for package in packages]
    Path(result_path).write_text(
        json.dumps({**result, "load_seconds": load_seconds, "versions": versions}), encoding="utf-8"
    )


def load(name: str, job: Job) -> tuple[Any, tuple[str, ...]]:
    """Returns the model ready to train, and the packages whose versions matter."""
    if name == "unsloth":
        return _load_unsloth(job), ("unsloth", "unsloth_zoo", "bitsandbytes", "transformers")
    packages: tuple[str, ...] = ("transformers", "peft")
    if name == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        packages = (*packages, "liger_kernel")
    return _load_transformers(job), (*packages, "bitsandbytes") if job["quantization"] == "nf4" else packages


def _load_unsloth(job: Job) -> Any:
    import unsloth  # noqa: F401 - it must be imported before what it patches
    from unsloth import FastLanguageModel

    _limit_memory(job)
    adapter = job["adapter"]
    length = _rows(job)["input_ids"].shape[-1]
    more = {} if adapter else {"full_finetuning": True}
    model, _ = FastLanguageModel.from_pretrained(
        model_name=job["model"],
        max_seq_length=length,
        dtype=_dtype(job),
        load_in_4bit=job["quantization"] == "nf4",
        local_files_only=True,
        **more,
    )
    if adapter:
        model = FastLanguageModel.get_peft_model(
            model,
            r=adapter["rank"],
            lora_alpha=adapter["alpha"],
            target_modules=[*adapter["targets"], *_unsloth_experts(adapter)],
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth" if job["checkpointing"] else False,
        )
    FastLanguageModel.for_training(model)
    if job["document_lengths"]:
        from unsloth.utils.packing import mark_allow_overlength

        mark_allow_overlength(model)
    return model


def _unsloth_experts(adapter: dict[str, Any]) -> list[str]:
    """Unsloth finds a mixture's 3-D parameters by the names of their parts as linear layers."""
    if not adapter["target_parameters"]:
        return []
    return ["gate_proj", "up_proj", "down_proj", "gate_up_proj"]


def _load_transformers(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    _limit_memory(job)
    more: dict[str, Any] = {"attn_implementation": "sdpa"} if job["has_attention"] else {}
    if job["quantization"] == "nf4":
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=_dtype(job),
            bnb_4bit_use_double_quant=True,
        )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=_dtype(job), device_map={"": _place(job)}, **more)
    model.config.use_cache = False
    if job["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    adapter = job["adapter"]
    if adapter is None:
        model.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=adapter["rank"],
            lora_alpha=adapter["alpha"],
            lora_dropout=0.0,
            bias="none",
            target_modules=adapter["targets"],
            task_type="CAUSAL_LM",
            **({"target_parameters": adapter["target_parameters"]} if adapter["target_parameters"] else {}),
        )
        model = get_peft_model(model, settings)
    model.train()
    return model


def train(name: str, model: Any, job: Job) -> dict[str, Any]:
    """Takes every step of the job; returns speed, memory, losses and the first gradient's norm."""
    import torch

    device = torch.device(_place(job))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(job, parameters)
    scaler = torch.amp.GradScaler(device.type, enabled=job["precision"] == "fp16")
    steps = inputs(name, job, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, norm = [], [], math.nan
    for number, micro_batches in enumerate(steps):
        _wait(device)
        start = time.perf_counter()
        total = 0.0
        for batch, share in micro_batches:
            with torch.autocast(device.type, dtype=_dtype(job), enabled=job["precision"] != "fp32"):
                loss = model(**batch).loss * share
            scaler.scale(loss).backward()
            total += loss.detach()
            del loss
        if number == 0:
            scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(total))
    return _summary(job, seconds, losses, norm, device)


def _summary(job: Job, seconds: list[float], losses: list[float], norm: float, device: Any) -> dict[str, Any]:
    warm = job["warmup_steps"]
    rates = [count / duration for count, duration in zip(job["tokens"][warm:], seconds[warm:], strict=True)]
    if not (all(map(math.isfinite, losses)) and norm > 0):
        raise SystemExit(f"losses {losses}, gradient norm {norm}")
    return {
        "tokens_per_second": statistics.median(rates),
        "step_seconds": statistics.median(seconds[warm:]),
        "first_step_seconds": seconds[0],
        "peak_bytes": _peak_bytes(device),
        "losses": losses,
        "gradient_norm": norm,
    }


def inputs(name: str, job: Job, device: Any) -> list[list[tuple[dict[str, Any], float]]]:
    """Returns each step's micro-batches as the model takes them, with the share of the step's trained tokens."""
    import torch

    rows = _rows(job)
    steps = []
    for step, (ids, targets) in enumerate(zip(rows["input_ids"], rows["targets"], strict=True)):
        trained = (targets != -100).sum()
        micro_batches = []
        for index in range(len(ids)):
            batch = {"input_ids": torch.from_numpy(ids[index]), "labels": torch.from_numpy(labels_of(targets[index]))}
            if job["document_lengths"]:
                batch |= _packing(name, job["document_lengths"][step][index])
                if name == "unsloth":  # takes one row, and where its documents end
                    batch = {key: value.reshape(1, -1) if value.ndim == 2 else value for key, value in batch.items()}
            share = float((targets[index] != -100).sum() / trained)
            micro_batches.append(({key: value.to(device) for key, value in batch.items()}, share))
        steps.append(micro_batches)
    return steps


def labels_of(targets: Any) -> Any:
    """Returns labels as Transformers shifts them itself, from targets `[B, T]` that are shifted already."""
    import numpy as np

    labels = np.full_like(targets, -100)
    labels[:, 1:] = targets[:, :-1]
    return labels


def _packing(name: str, lengths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Positions that restart with each document, by which Transformers knows them; Unsloth takes their lengths."""
    import torch

    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    if name != "unsloth":
        return {"position_ids": positions}
    flat = [length for row in lengths for length in row]
    return {"position_ids": positions, "packed_seq_lengths": torch.tensor(flat, dtype=torch.int32)}


def _optimizer(job: Job, parameters: list[Any]) -> Any:
    import torch

    if job["optimizer"] == "adamw":
        return torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    if job["optimizer"] == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=job["learning_rate"], weight_decay=0.0)
    raise SystemExit(f"the optimiser {job['optimizer']} is not compared")


def _rows(job: Job) -> Any:
    import numpy as np

    return np.load(job["rows"])


def _dtype(job: Job) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job["precision"]]


def _place(job: Job) -> str:
    return "cuda:0" if job["device"] == "cuda" else job["device"]


def _limit_memory(job: Job) -> None:
    import torch

    torch.manual_seed(job["seed"])
    if job["memory_limit_gib"] and job["device"] == "cuda":
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["memory_limit_gib"] * 2**30 / total))


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _peak_bytes(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} unknown"


if __name__ == "__main__":
    main(*sys.argv[1:])
