"""What is measured: a model, how it is trained, and how its work is spread over so many GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One kind of work. `rows` of `length` tokens go through each GPU at once.

    All counts of GPUs take the same steps: as many rows as the largest count takes at once. Fewer GPUs go through
    them in turns, so that losses can be compared step by step; with `context`, all GPUs share each row instead.
    `strategy`: of more than one GPU. `min_gpus`: fewer have not the memory. `changes`: settings besides.
    """

    model: str
    rows: int = 2
    length: int = 4096
    strategy: str = "ddp"
    adapter: bool = True
    quantization: str = "none"
    context: bool = False
    min_gpus: int = 1
    peer: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    def batch_size(self, counts: Sequence[int]) -> int:
        """Returns the rows of a step, the same for all `counts` of GPUs."""
        return self.rows if self.context else self.rows * max(counts)

    def config(
        self,
        gpus: int,
        counts: Sequence[int],
        *,
        folder: str,
        strategy: str | None = None,
        engine_changes: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Returns the YAML of the run on so many GPUs, as values; `folder` holds the model.

        `strategy`: another than the cell's, also for one GPU, which is "single" otherwise. `engine_changes`: settings
        of `engine` besides.
        """
        engine: dict[str, Any] = {
            "micro_batch_size": self.rows,
            "strategy": strategy or (self.strategy if gpus > 1 else "single"),
            "context_parallel": gpus if self.context else 1,
            **(engine_changes or {}),
        }
        values: dict[str, Any] = {
            "model": {"base": folder, "quantization": self.quantization},
            # The benchmark draws its own rows.
            "data": {
                "train": [{"path": "builtin:fine-tuning"}],
                "sequence_length": self.length,
                "packing": False,
            },
            "train": {"batch_size": self.batch_size(counts), "learning_rate": 1e-4, "steps": 1000},
            "engine": engine,
            "output": {"folder": "runs/scaling"},
        }
        if self.adapter:
            values["adapter"] = {"rank": 16, "alpha": 16}
        for path, value in self.changes.items():
            section, _, name = path.partition(".")
            values[section][name] = value
        return values


CELLS: dict[str, Cell] = {
    "lora_8b": Cell("llama-3.1-8b", peer=True),
    "full_1b": Cell("llama-3.2-1b", strategy="fsdp2", adapter=False, rows=4, peer=True),
    "nf4_8b": Cell("llama-3.1-8b", strategy="fsdp2", quantization="nf4"),
    "context_32k": Cell("llama-3.1-8b", rows=1, length=32768, context=True),
    "lora_8b_fsdp2": Cell("llama-3.1-8b", strategy="fsdp2", peer=True),
    "mixtral": Cell("mixtral-8x7b-4-layers", strategy="fsdp2"),
    "nf4_70b_16_layers": Cell("llama-3.1-70b-16-layers", strategy="fsdp2", quantization="nf4", rows=1),
    "context_131k": Cell("llama-3.1-8b", rows=1, length=131072, context=True, min_gpus=2, strategy="fsdp2"),
    "full_8b_16_layers": Cell("llama-3.1-8b-16-layers", strategy="fsdp2", adapter=False, rows=1, min_gpus=2, peer=True),
    "full_8b": Cell("llama-3.1-8b", strategy="fsdp2", adapter=False, rows=1, min_gpus=4, peer=True),
    "nf4_70b": Cell(
        "llama-3.1-70b-nf4",
        strategy="fsdp2",
        quantization="nf4",
        rows=1,
        min_gpus=2,
        changes={"engine.memory_limit_gib": 80.0},
    ),
    "lora_70b": Cell("llama-3.1-70b", strategy="fsdp2", rows=1, min_gpus=4, peer=True),
    "tiny": Cell("llama-tiny", rows=1, length=64, peer=True),
    "tiny_full": Cell("llama-tiny", rows=1, length=64, strategy="fsdp2", adapter=False, peer=True),
    "tiny_nf4": Cell("llama-tiny-nf4", rows=1, length=64, strategy="fsdp2", quantization="nf4"),
    "tiny_context": Cell("llama-tiny", rows=1, length=64, context=True),
}
"""The most important first. `lora_70b` needs 141 GB of disk (`--models`), `nf4_70b` 40; the tiny ones need no GPU."""

ALONE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "single": ("single", {}),
    "fsdp2": ("fsdp2", {}),
    "deepspeed": ("deepspeed", {}),
    "ddp": ("ddp", {}),
    "fsdp2_engine": ("fsdp2", {"fsdp2": {"reduce_dtype": "bf16"}}),
    "deepspeed_engine": ("deepspeed", {"deepspeed": {"config": {"zero_optimization": {"stage": 2}}}}),
}
"""What `alone` runs on one GPU, where strategies have nothing to share: their names, and settings of `engine` besides.

The plan runs a strategy as `single` there, unless it is told to do more than share. What ends in `_engine` is, by a
setting of no weight (an adapter's gradients are rounded; DeepSpeed's stage is 2 anyway): what is slower is its own
cost.
"""
