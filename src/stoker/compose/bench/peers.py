"""Other trainers on the same job, each in a process of its own: who is there, what they are given, what came back."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stoker.arch import arithmetic
from stoker.arch.borrowed import AnySpec
from stoker.arch.spec import AttentionSpec, ExpertsSpec
from stoker.compose.bench.measure import WARMUP_STEPS, Steps
from stoker.compose.bench.result import Measured
from stoker.compose.model import Base
from stoker.config.schema import RunConfig
from stoker.errors import ConfigError
from stoker.plan.plan import Plan

NEEDS: dict[str, tuple[str, ...]] = {
    "hf": ("transformers", "peft"),
    "liger": ("transformers", "peft", "liger_kernel"),
    "unsloth": ("unsloth",),
}
"""Peer -> modules that it takes."""
NEED_A_GPU = ("liger", "unsloth")
_LOSS_TOLERANCE = 0.01
"""How far a peer's first loss may be from ours, relative: bf16 and fp8 products move a random model's by about 0.1%."""


def parse(text: str) -> list[str]:
    """Returns the peers named in "hf,liger".

    Raises:
        ConfigError: there is no such peer.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NEEDS:
            raise ConfigError(f"--peers {name}: there is no such peer.", fix=f"Known: {', '.join(NEEDS)}.")
    return names


def why_not(name: str, *, device: str) -> str:
    """Returns why a peer cannot run here, or ""."""
    missing = [module for module in NEEDS[name] if importlib.util.find_spec(module) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "it needs a CUDA GPU" if name in NEED_A_GPU and device != "cuda" else ""


def write_job(config: RunConfig, plan: Plan, base: Base, steps: Steps, folder: Path) -> Path:
    """Writes what a peer must do; returns the file that says it."""
    first = steps.batches[0][0]
    shape = (len(steps.batches), len(steps.batches[0]), *first.input_ids.shape)
    arrays: dict[str, Any] = {
        name: np.stack([getattr(one, name).numpy() for step in steps.batches for one in step]).reshape(shape)
        for name in ("input_ids", "targets")
    }
    np.savez(folder / "rows.npz", **arrays)
    lengths = [[one.document_lengths for one in step] for step in steps.batches] if steps.is_packed else None
    job = {
        "model": str(base.folder.resolve()),
        "rows": str(folder / "rows.npz"),
        "document_lengths": lengths,
        "tokens": steps.tokens,
        "warmup_steps": WARMUP_STEPS,
        "adapter": _adapter(config, base),
        "has_attention": any(isinstance(layer.mixer, AttentionSpec) for layer in base.spec.layers),
        "quantization": plan.quantization if plan.quantization == "nf4" else "none",
        "checkpointing": any(rung != "all" for rung in plan.keep) or _makes_again(base.spec),
        "precision": plan.precision,
        "learning_rate": config.train.learning_rate,
        "optimizer": config.train.optimizer.kind,
        "seed": config.train.seed,
        "device": plan.device,
        "num_threads": plan.num_threads,
        "memory_limit_gib": config.engine.memory_limit_gib,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def _adapter(config: RunConfig, base: Base) -> dict[str, Any] | None:
    if config.adapter is None:
        return None
    targets, experts = config.adapter.targets, arithmetic.expert_counts(base.spec)
    if targets == "all-linear":
        only = arithmetic.linears_by_name_only(base.spec)
        targets = list(
            dict.fromkeys(ending(name, 1) for name in arithmetic.linear_shapes(base.spec) if name not in only)
        )
    # By the last parts of their names: module that holds the mixture, its experts, parameter.
    parameters = {ending(name, 3): ending(name, 1) for name in experts}
    return {
        "rank": config.adapter.rank,
        "alpha": config.adapter.alpha,
        "targets": [target for target in targets if target not in parameters.values()],
        # What PEFT calls adapters of 3-D parameters.
        "target_parameters": [name for name, short in parameters.items() if short in targets],
    }


def ending(name: str, count: int) -> str:
    """The last `count` parts of a dotted name."""
    return ".".join(name.split(".")[-count:])


def _makes_again(spec: AnySpec) -> bool:
    """Whether layers run parts of themselves again of their own accord, as mixtures do; a peer then may do so too."""
    return any(isinstance(getattr(layer, "feed_forward", None), ExpertsSpec) for layer in spec.layers)


def run(name: str, job: Path, *, timeout_seconds: float) -> Measured:
    """Runs a peer and returns what it measured; whatever goes wrong there is its `error`."""
    output = job.with_name(f"{name}.json")
    command = [sys.executable, "-m", "stoker.compose.bench.peer", name, str(job), str(output)]
    # In the job's folder, because some trainers leave files where they run.
    places = os.pathsep.join(str(Path(place).resolve()) for place in sys.path if place)
    try:
        done = subprocess.run(
            command,
            cwd=job.parent,
            env={**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return Measured(name, error=f"it did not end within {timeout_seconds:.0f} s")
    if done.returncode or not output.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return Measured(name, error=f"exit code {done.returncode}: {lines[-1][:300]}")
    values: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    losses, versions = tuple(values.pop("losses")), tuple(values.pop("versions"))
    return Measured(name, losses=losses, versions=versions, **values)


def checked(peer: Measured, ours: Measured) -> Measured:
    """Returns the peer's numbers, or an error instead if its first loss, on the same weights and rows, is not ours."""
    if peer.error or not peer.losses:
        return peer
    mine, theirs = ours.losses[0], peer.losses[0]
    if math.isclose(mine, theirs, rel_tol=_LOSS_TOLERANCE):
        return peer
    return Measured(peer.name, error=f"its first loss is {theirs:.4f}, ours {mine:.4f}: not the same job")


def as_values(measured: Measured) -> dict[str, Any]:
    """Returns a measurement as JSON values; numbers that are not there become null."""
    values = dataclasses.asdict(measured)
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def names_without(asked: Sequence[str], *, device: str) -> dict[str, str]:
    """Returns those of the peers asked for that are left out, with the reason."""
    reasons = {name: why_not(name, device=device) for name in asked}
    return {name: reason for name, reason in reasons.items() if reason}
