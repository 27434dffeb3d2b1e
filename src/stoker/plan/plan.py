"""The plan: everything the engine decided, each with its reason; saved as `plan.json` and printed as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stoker.arch.activations import Keep
from stoker.plan import ladder
from stoker.plan.memory import CATEGORIES, GIB, Memory
from stoker.plan.spread import Spread, StrategyName

CHOICES = (
    "device",
    "strategy",
    "reshards",
    "precision",
    "quantization",
    "keep_transposed",
    "head_in_fp8",
    "kernels",
    "layers",
    "micro_batch_size",
    "recompute",
    "tile_tokens",
    "offload_activations",
    "cuda_graphs",
    "num_threads",
)
"""The fields that are choices, in the order in which they are shown; each has a reason.

One that is None does not arise in a run, and is not shown.
"""


@dataclass(frozen=True)
class Plan:
    """How a run will be run. `row_tokens`: tokens of a row at most; a step is `accumulation_steps` micro-batches.

    `keep_transposed`: transposed copies of fp8 weights stay beside them (None: no fp8). `head_in_fp8`: the head's
    products run in fp8 too (None: no fp8). `layers`: each is one fused operation, or runs op by op. `keep`: what
    each layer keeps for the backward (`arch.activations.LADDER`). `tile_tokens`: the feed-forward goes through so many
    tokens at a time (None: through a whole micro-batch). `cuda_graphs`: micro-batches are captured and replayed.
    `host_bytes`: pinned host memory in which kept tensors wait; `staying_layers`: those of so many layers, the last
    ones, do not.
    Sizes and memory are those of one of `num_processes`, of which `per_node` are in each node; `stage`: of ZeRO.
    `reshards`: FSDP2 lets a layer's weights go after its forward (None: another strategy). The other fields of `spread`
    stand for themselves.
    """

    device: str
    device_name: str
    strategy: StrategyName
    precision: Literal["fp32", "bf16", "fp16"]
    quantization: str
    keep_transposed: bool | None
    kernels: Literal["reference", "triton"]
    layers: ladder.Layers
    micro_batch_size: int
    accumulation_steps: int
    keep: tuple[Keep, ...]
    tile_tokens: int | None
    offload_activations: bool
    cuda_graphs: bool
    num_threads: int
    row_tokens: int
    num_parameters: int
    num_trained_parameters: int
    flops_per_token: float
    memory: Memory
    host_bytes: int
    available_bytes: int
    reasons: Mapping[str, str]
    num_processes: int = 1
    per_node: int = 1
    stage: int = 0
    replicas: int = 1
    reshards: bool | None = None
    on_host: tuple[str, ...] = ()
    sharing: int = 1
    on_disk: tuple[str, ...] = ()
    bucket_values: int | None = None
    param_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    staying_layers: int = 0
    head_in_fp8: bool | None = None

    @property
    def spread(self) -> Spread:
        """How it is spread over devices."""
        return Spread(
            self.strategy,
            self.num_processes,
            self.per_node,
            self.stage,
            self.replicas,
            self.reshards is not False,
            frozenset(self.on_host),
            self.sharing,
            frozenset(self.on_disk),
            self.bucket_values,
            self.param_dtype,
            self.reduce_dtype,
        )

    @property
    def recompute(self) -> str:
        """The ladder in words: "keep all in 30 layers, mixer in 2"."""
        return ladder.words(self.keep)

    @property
    def ladder(self) -> ladder.Ladder:
        """What the layers keep, and how they run."""
        return ladder.Ladder(self.keep, self.offload_activations, self.layers, self.tile_tokens, self.staying_layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        values: dict[str, Any] = {
            **asdict(self),
            "reasons": dict(self.reasons),
            "recompute": self.recompute,
            "keep": list(self.keep),
        }
        values["memory"] = {f"{name}_bytes": count for name, count in values["memory"].items()}
        values["memory"]["total_bytes"] = self.memory.total
        return values

    def table(self) -> str:
        """Returns the plan as aligned lines for people: each choice with its reason, then sizes and memory."""
        rows = [
            (name, _shown(value), self.reasons[name]) for name in CHOICES if (value := getattr(self, name)) is not None
        ]
        share = self.num_trained_parameters / self.num_parameters
        rows += [
            ("accumulation", str(self.accumulation_steps), "micro-batches a step"),
            (
                "parameters",
                f"{_count(self.num_trained_parameters)} trained",
                f"{share:.2%} of {_count(self.num_parameters)}",
            ),
            ("memory", size(self.memory.total), f"of {size(self.available_bytes)} free: {_parts(self.memory)}"),
        ]
        left, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"{name:<{left}}  {value:<{middle}}  {reason}" for name, value, reason in rows)


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def size(num_bytes: int) -> str:
    """Returns bytes for people: 1.5 GiB, 320 MiB."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _parts(memory: Memory) -> str:
    counts = ((name, getattr(memory, name)) for name in (*CATEGORIES, "states_on_host"))
    return ", ".join(f"{name} {size(count)}" for name, count in counts if count)
