"""What others publish of memory, beside what the plan says of the same run: the tables of docs/plan.md."""

from dataclasses import replace

from stoker.arch import shapes
from stoker.config.load import parse
from stoker.config.schema import RunConfig
from stoker.errors import PlanError
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware
from stoker.plan.memory import zero_bytes
from stoker.plan.plan import Plan

GB, GIB = 10**9, 2**30
# Unsloth's README, "context length benchmarks": 4-bit QLoRA on all linear layers, rank 32, one row, an A100 of 80 GB.
CONTEXTS = {
    ("llama-3.1-8b", 12): 21_848,
    ("llama-3.1-8b", 16): 40_724,
    ("llama-3.1-8b", 24): 78_475,
    ("llama-3.1-8b", 40): 153_977,
    ("llama-3.1-8b", 80): 342_733,
    ("llama-3.1-70b", 80): 89_389,
}
# Unsloth's page on requirements, "the absolute minimum" in GB: 4-bit, 16-bit.
LEAST = {
    "llama-3.2-3b": (3.5, 8),
    "llama-3.1-8b": (6, 22),
    "qwen3-14b": (8.5, 33),
    "qwen3-32b": (26, 76),
    "llama-3.1-70b": (41, 164),
    "llama-3.1-405b": (237, 950),
}
# arXiv:1910.02054, figure 1: states of 7.5 billion parameters on 64 GPUs, in GB, by stage.
ZERO = {1: 31.4, 2: 16.6, 3: 1.9}
_STEP = 512


def run(length: int, *, quantization: str = "nf4", rank: int = 32, optimizer: str = "adamw") -> RunConfig:
    """A LoRA run on rows of `length` tokens, one at a time."""
    return parse(
        {
            "model": {"base": "shape", "quantization": quantization},
            "adapter": {"rank": rank},
            "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": length},
            "train": {"learning_rate": 1e-4, "batch_size": 1, "optimizer": {"kind": optimizer}},
            "output": {"folder": "runs/anchor"},
        }
    )


def machine(gib: float) -> Hardware:
    """An A100 with so much memory, and a large host."""
    gpu = Device("cuda", "A100", int(gib * GIB), bf16=True, compute_capability=(8, 0), triton=True)
    return Hardware((gpu, Device("cpu", "host", 10**12)))


def longest(name: str, gib: float) -> int:
    """Returns the longest row that the plan lets through, to 512 tokens."""
    spec = replace(shapes.spec(name), max_positions=2**22)

    def fits(length: int) -> bool:
        try:
            choose(run(length), spec, machine(gib), advise=False)
        except PlanError:
            return False
        return True

    low, high = 0, 2**20 // _STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle)
    return low * _STEP


def least(name: str, quantization: str) -> Plan:
    """Returns the plan of the least that trains: rows of 512 tokens, rank 16, 8-bit AdamW, all recomputed."""
    config = run(512, quantization=quantization, rank=16, optimizer="adamw_8bit")
    engine = config.engine.model_copy(update={"recompute": "input"})
    return choose(config.model_copy(update={"engine": engine}), shapes.spec(name), machine(10**6))


def states(stage: int) -> float:
    """Returns GB of weights, gradients and optimiser on one of 64 GPUs, of 7.5 billion parameters under ZeRO."""
    return zero_bytes(7.5, 64, stage)


def tables() -> str:
    """Returns the tables as Markdown."""
    lines = ["| longest row of an NF4 base, rank 32 | published | plan | |", "|---|---|---|---|"]
    for (name, gib), published in CONTEXTS.items():
        ours = longest(name, gib)
        lines.append(f"| {name}, {gib} GB | {published:,} | {ours:,} | {ours / published:.2f} x |")
    lines += ["", "| least memory, GB | 4-bit | plan | 16-bit | plan |", "|---|---|---|---|---|"]
    for name, (four, sixteen) in LEAST.items():
        ours = [least(name, kind).memory.total / GB for kind in ("nf4", "none")]
        lines.append(f"| {name} | {four:g} | {ours[0]:.1f} | {sixteen:g} | {ours[1]:.1f} |")
    lines += ["", "| states of 7.5 billion parameters on 64 GPUs, GB | ZeRO's paper | plan |", "|---|---|---|"]
    lines += [f"| ZeRO-{stage} | {published} | {states(stage):.1f} |" for stage, published in ZERO.items()]
    return "\n".join(lines)
