"""The cells that the plan is held to, and what it says of each. Needs neither a GPU nor PyTorch.

A cell is one model with one method, micro-batch, length and rung: predicted peak memory and seconds a step stand beside
measured ones (`plan_proof.py`). A frontier is a cap on memory: the largest micro-batch that the plan lets through must
train, and one row more must fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stoker.arch import families, shapes
from stoker.arch.spec import ArchSpec
from stoker.compose.bench.shapes import SHAPES
from stoker.config.load import parse
from stoker.config.schema import RunConfig
from stoker.errors import PlanError
from stoker.plan import catalogue, rates, speed
from stoker.plan.calibration import Calibration
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware
from stoker.plan.ladder import Ladder
from stoker.plan.memory import workspace_bytes
from stoker.plan.plan import Plan

GIB = 2**30
HOST_BYTES = 100 * GIB
# Every third cell, in the order of their names, takes no part in fitting.
_HELD_OUT = 3


@dataclass(frozen=True)
class Cell:
    """One run of a few steps.

    `method`: full, bf16 (every weight, kept in bf16), lora, nf4, int8 or fp8; with DoRA dora, dora_nf4 and so on.
    """

    name: str
    shape: str
    method: str
    rows: int
    length: int
    rung: str
    offload: bool = False
    packed: bool = False
    layers: int | None = None
    precision: str = "auto"

    @property
    def model(self) -> tuple[str, int | None, str]:
        """What has to be built for it: cells with the same one share the model."""
        return self.shape, self.layers, self.method

    def spec(self) -> ArchSpec:
        """The architecture, of the first few layers alone if told so."""
        spec = families.read(SHAPES[self.shape], self.shape) if self.shape in SHAPES else shapes.spec(self.shape)
        return spec if self.layers is None else replace(spec, layers=spec.layers[: self.layers])

    def config(self, rows: int | None = None) -> RunConfig:
        """The run, with `rows` in place of the cell's own."""
        rows = rows or self.rows
        values: dict[str, Any] = {
            "model": {"base": f"shape:{self.shape}"},
            "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": self.length, "packing": self.packed},
            "train": {"learning_rate": 1e-5, "batch_size": rows, "steps": 10},
            "engine": {
                "micro_batch_size": rows,
                "recompute": self.rung,
                "offload_activations": self.offload,
                "precision": self.precision,
            },
            "output": {"folder": "runs/proof"},
        }
        if self.method in ("full", "bf16"):
            values["train"]["weight_dtype"] = "bf16" if self.method == "bf16" else "fp32"
        else:
            kind = "dora" if self.method.startswith("dora") else "lora"
            values["adapter"] = {"rank": 16, "kind": kind}
            base = self.method.removeprefix("dora").removeprefix("_").removeprefix("lora")
            values["model"]["quantization"] = base or "none"
        return parse(values)


@dataclass(frozen=True)
class Frontier:
    """A cap of so many GiB, and the cell whose rows are looked for."""

    cap_gib: float
    cell: Cell

    @property
    def name(self) -> str:
        """Its name among the cells."""
        return f"{self.cap_gib:g}GiB-{self.cell.name}"


def _cells(shape: str, method: str, *rows: tuple[Any, ...], layers: int | None = None) -> list[Cell]:
    """Cells of one model, each (rows, length, rung[, "offload"][, "packed"])."""
    made = []
    for count, length, rung, *more in rows:
        name = "-".join([shape, method, f"{count}x{length}", rung, *more])
        flags = dict.fromkeys(more, True)
        made.append(Cell(name, shape, method, count, length, rung, layers=layers, **flags))
    return made


GRID: tuple[Cell, ...] = (
    *_cells(
        "llama-3.2-1b",
        "lora",
        (8, 2048, "none"),
        (16, 512, "none"),
        (1, 8192, "mixer"),
        (4, 4096, "attention", "offload"),
        (2, 8192, "input"),
        (1, 32768, "attention", "offload"),
        (4, 2048, "none", "packed"),
    ),
    *_cells("llama-3.2-1b", "full", (8, 2048, "none"), (4, 4096, "mixer"), (16, 512, "input"), (2, 2048, "attention")),
    *_cells("llama-3.2-1b", "bf16", (8, 2048, "none"), (4, 2048, "input")),
    *_cells("llama-3.2-1b", "nf4", (8, 2048, "none"), (4, 4096, "attention"), (1, 16384, "mixer")),
    *_cells("llama-3.2-1b", "fp8", (8, 2048, "none"), (4, 4096, "mixer")),
    *_cells(
        "llama-3.2-3b",
        "lora",
        (4, 4096, "none"),
        (2, 2048, "mixer"),
        (16, 1024, "attention"),
        (4, 4096, "none", "packed"),
    ),
    *_cells("llama-3.2-3b", "full", (4, 2048, "none"), (2, 4096, "input")),
    *_cells("llama-3.2-3b", "nf4", (4, 4096, "none"), (8, 2048, "input", "offload")),
    *_cells(
        "llama-3.1-8b",
        "lora",
        (2, 4096, "none"),
        (2, 4096, "mixer"),
        (4, 2048, "attention"),
        (2, 4096, "attention", "offload"),
        (2, 4096, "input"),
        (1, 16384, "attention"),
        (16, 512, "none"),
        (2, 4096, "mixer", "packed"),
    ),
    *_cells(
        "llama-3.1-8b",
        "nf4",
        (2, 4096, "none"),
        (2, 4096, "attention", "offload"),
        (1, 32768, "attention", "offload"),
        (8, 1024, "mixer"),
    ),
    *_cells("llama-3.1-8b", "fp8", (2, 4096, "none"), (4, 2048, "mixer"), (2, 4096, "attention")),
    *_cells("llama-3.1-8b", "int8", (2, 4096, "mixer")),
    *_cells("llama-3.1-8b", "bf16", (2, 2048, "mixer")),
    *_cells("qwen3-14b", "lora", (2, 2048, "none"), (1, 8192, "mixer")),
    *_cells("qwen3-14b", "nf4", (2, 4096, "attention"), (1, 16384, "attention", "offload")),
    *_cells("mixtral-8x7b-4-layers", "lora", (2, 2048, "none"), (2, 4096, "input")),
    *_cells("mixtral-8x7b-4-layers", "nf4", (2, 4096, "attention")),
    *_cells("mamba-2.8b", "lora", (4, 2048, "mixer"), (8, 1024, "input"), layers=24),
)

DORA: tuple[Cell, ...] = (
    *_cells("llama-3.2-1b", "lora", (4, 2048, "mixer")),
    *_cells("llama-3.2-1b", "dora", (8, 2048, "none"), (4, 2048, "mixer"), (2, 8192, "input")),
    *_cells("llama-3.1-8b", "dora", (2, 4096, "mixer")),
    *_cells("llama-3.1-8b", "dora_nf4", (2, 4096, "attention")),
)
"""DoRA, of which nothing was fitted: its share of the time is counted from the operations that it takes."""

FRONTIERS: tuple[Frontier, ...] = tuple(
    Frontier(cap, cell)
    for caps, cell in (
        ((24,), Cell("1b-full-1024-none", "llama-3.2-1b", "full", 1, 1024, "none")),
        ((40,), Cell("1b-full-2048-none", "llama-3.2-1b", "full", 1, 2048, "none")),
        ((15,), Cell("1b-lora-2048-none", "llama-3.2-1b", "lora", 1, 2048, "none")),
        ((15, 24), Cell("8b-nf4-2048-attention", "llama-3.1-8b", "nf4", 1, 2048, "attention")),
        ((24, 40), Cell("8b-lora-2048-mixer", "llama-3.1-8b", "lora", 1, 2048, "mixer")),
        ((40,), Cell("8b-lora-2048-none", "llama-3.1-8b", "lora", 1, 2048, "none")),
        ((80,), Cell("8b-lora-4096-none", "llama-3.1-8b", "lora", 1, 4096, "none")),
        ((40,), Cell("8b-nf4-2048-none", "llama-3.1-8b", "nf4", 1, 2048, "none")),
        ((80,), Cell("8b-fp8-4096-none", "llama-3.1-8b", "fp8", 1, 4096, "none")),
        ((40,), Cell("14b-nf4-2048-mixer", "qwen3-14b", "nf4", 1, 2048, "mixer")),
    )
    for cap in caps
)

CPU: tuple[Cell, ...] = tuple(
    replace(cell, precision="fp32")
    for cell in (
        *_cells(
            "llama-tiny",
            "full",
            (1, 64, "none"),
            (4, 128, "none"),
            (8, 256, "none"),
            (8, 256, "input"),
            (16, 128, "mixer"),
            (4, 256, "none", "packed"),
        ),
        *_cells("llama-tiny", "lora", (2, 64, "none"), (8, 128, "none"), (4, 512, "attention")),
        *_cells("smollm2-135m", "lora", (1, 256, "none"), (2, 128, "input"), (4, 128, "none"), layers=4),
        *_cells("smollm2-135m", "full", (1, 128, "none"), (2, 256, "mixer"), layers=4),
    )
)
"""Tiny models on a CPU, for the time alone: a process's memory is mostly PyTorch's libraries there."""


def is_held_out(name: str, cells: Sequence[Cell] = GRID) -> bool:
    """Whether a cell of the grid, or of others, takes no part in fitting."""
    if name in {cell.name for cell in DORA}:
        return True
    return sorted(cell.name for cell in cells).index(name) % _HELD_OUT == 1


@dataclass(frozen=True)
class Prediction:
    """What the plan says of a cell."""

    plan: Plan
    bytes_by_category: Mapping[str, int]
    seconds: float
    parts: Mapping[str, float]
    workspace_bytes: int = 0

    @property
    def allocated_bytes(self) -> int:
        """At the peak, without what the allocator and the driver add, but with cuBLAS' workspaces."""
        return self.plan.memory.total - self.plan.memory.reserve + self.workspace_bytes


def hardware(device: Device) -> Hardware:
    """A machine of this device, with a host beside a GPU."""
    return Hardware((device,) if device.kind == "cpu" else (device, Device("cpu", "host", HOST_BYTES)))


def rates_of(device: Device, measured: Calibration | None) -> rates.Rates:
    """Returns the device's figures: the catalogue's, or those that were measured."""
    if device.kind == "cpu":
        known = rates.of_catalogue(device, num_threads=1)
    else:
        shipped = catalogue.shipped()
        known = rates.Rates(catalogue.by_name(device.name, shipped) or shipped["h200"])
    return known if measured is None else measured.rates(known)


def predict(
    cell: Cell,
    device: Device,
    *,
    rows: speed.Rows | None = None,
    count: int | None = None,
    ladder: Ladder | None = None,
    measured: Calibration | None = None,
) -> Prediction:
    """Returns what the plan says of `count` rows on the device; raises PlanError where they do not fit.

    `measured`: the device's own figures, in place of the catalogue's.
    """
    config, spec = cell.config(count), cell.spec()
    plan = choose(config, spec, hardware(device), ladder=ladder)
    rows = rows or speed.Rows(cell.length, cell.length)
    known = rates_of(device, measured)
    step = speed.step(config, spec, plan, known.device, rows=rows, efficiencies=known.efficiencies)
    workspaces = workspace_bytes(device.compute_capability) if device.kind == "cuda" else 0
    return Prediction(plan, dict(vars(plan.memory)), step.seconds, step.parts(), workspaces)


def most_rows(cell: Cell, device: Device) -> int:
    """Returns how many rows the plan lets through at most; 0: none."""
    rows = 0
    while rows < 512:
        try:
            choose(cell.config(rows + 1), cell.spec(), hardware(device), advise=False)
        except PlanError:
            return rows
        rows += 1
    return rows
