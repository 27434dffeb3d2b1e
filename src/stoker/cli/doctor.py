"""`stoker doctor`: what this machine has, what is missing, and the command that mends it."""

import importlib.util
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from stoker.errors import ConfigError

REQUIRED = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "datasets", "pydantic", "plotly")
OPTIONAL = {
    "tensorboard": ("curves in TensorBoard", "pip install tensorboard"),
    "wandb": ("Weights & Biases tracking", "pip install wandb"),
    "mlflow": ("MLflow tracking", "pip install mlflow"),
}
_GIB = 2**30
_MARKS = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "absent": "[dim]absent[/]", "warning": "[yellow]look[/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `state` is ok, missing (needed), absent (optional) or warning."""

    name: str
    state: str
    detail: str
    fix: str = ""


def command(
    folder: Annotated[Path, typer.Option(help="Where runs will be written: its free space is shown.")] = Path(),
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine, under a minute; plans use what is found.")
    ] = False,
    gpus: Annotated[
        int, typer.Option(min=1, help="With --calibrate: measure collectives over so many GPUs as well.")
    ] = 1,
) -> None:
    """Show versions, devices, what is missing, and the command that mends it; or measure how fast this machine is.

    Example: stoker doctor --calibrate
    """
    if gpus > 1 and not calibrate:
        raise ConfigError("--gpus says over how many GPUs collectives are measured.", fix="Add --calibrate.")
    if calibrate:
        _calibrate(folder, gpus)
        return
    findings = [*packages(), *devices(), *places(folder)]
    _print(findings)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _print(findings: Sequence["Finding"]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "found", "to mend or add"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(_MARKS[finding.state], *map(escape, (finding.name, finding.detail, finding.fix)))
    Console().print(table)


def _calibrate(folder: Path, gpus: int) -> None:
    from stoker.compose.calibrate import calibrate
    from stoker.plan import calibration

    calibration.make_folder()  # before a minute is spent
    start = time.perf_counter()
    found = calibrate(folder, num_gpus=gpus, say=typer.echo)
    path = calibration.save(found)
    typer.echo(f"Measured in {time.perf_counter() - start:.0f} s and kept in {path}: plans for this machine use it.")


def packages() -> list[Finding]:
    """Returns what is installed of what Stoker needs and of what it can use."""
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [Finding("Python", "ok", f"{python} on {platform.system()} {platform.machine()}")]
    for name in REQUIRED:
        version = _version(name)
        fix = "" if version else f"pip install {name}"
        findings.append(Finding(name, "ok" if version else "missing", version or "", fix))
    for name, (use, fix) in OPTIONAL.items():
        version = _version(name)
        findings.append(Finding(name, "ok" if version else "absent", version or use, "" if version else fix))
    return findings


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[Finding]:
    """Returns the CPU, and each GPU that torch can use, or why there is none."""
    import psutil

    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    detail = f"{cores} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB memory free"
    return [Finding("CPU", "ok", detail), *_gpus()]


def _gpus() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda or torch.version.hip:
            return [Finding("GPU", "warning", "none that torch can use", "Look at nvidia-smi: driver or card missing?")]
        fix = "On a machine with a GPU: pip install --force-reinstall torch (the build with CUDA)"
        return [Finding("GPU", "absent", "this torch is a CPU build; runs use the CPU", fix)]
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    numbers = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16 (no bf16)"
    capability = f"sm_{properties.major}{properties.minor}"
    detail = f"{properties.name}, {capability}, {numbers}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    return Finding(f"GPU {index}", "ok", detail)


def places(folder: Path) -> list[Finding]:
    """Returns free disk space where runs are written and whether Hugging Face's hub may be asked."""
    import huggingface_hub.constants as hub

    from stoker.plan import calibration

    free = shutil.disk_usage(folder if folder.exists() else Path()).free / _GIB
    low = free < 5
    disk = Finding("disk", "warning" if low else "ok", f"{free:.1f} GiB free", "Free some space." if low else "")
    offline = hub.HF_HUB_OFFLINE
    access = (
        "offline (HF_HUB_OFFLINE is set): only local folders and cached models" if offline else "online when needed"
    )
    kept = sorted(one.name for one in calibration.folder().glob("calibration-*.json"))
    measured = Finding("calibration", "ok", f"{calibration.folder()}: {', '.join(kept)}")
    if not kept:
        measured = Finding("calibration", "absent", "plans rest on data sheets", "stoker doctor --calibrate")
    return [
        disk,
        measured,
        Finding("Hugging Face hub", "ok", access),
        Finding("model cache", "ok", str(hub.HF_HUB_CACHE)),
    ]
