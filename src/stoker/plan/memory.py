"""Bytes that a training step holds at its peak on one device, by what holds them.

The peak lies in the backward pass: weights, gradients, the optimiser's state and what the forward kept live at once.
Trained weights, their gradients and the optimiser's averages are fp32 (Micikevicius et al. 2018); frozen weights are in
the compute type. These are estimates for choosing; a run prints the measured peak beside them.
"""

from dataclasses import asdict, dataclass

from stoker.arch import arithmetic
from stoker.arch.spec import ArchSpec
from stoker.config.schema import Optimizer

GIB = 2**30
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What is there before a model is: PyTorch's libraries, and on a GPU the CUDA context and cuBLAS workspaces.
BASE_BYTES = {"cpu": GIB // 2, "cuda": GIB, "mps": GIB}
# The head's logits are made in chunks of at most this many bytes, with as much again for their gradient.
_LOGITS_BYTES = 2 * 128 * 2**20
# Freed blocks of odd sizes that the allocator cannot hand out again, as a share of everything else.
_FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes by category."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reserve: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def estimate(
    spec: ArchSpec,
    *,
    trained: int,
    frozen: int,
    optimizer: Optimizer,
    tokens: int,
    precision: str,
    recompute: arithmetic.Recompute,
    device: str,
) -> Memory:
    """Returns what a micro-batch of `tokens` tokens needs; `trained` and `frozen` are counts of parameters."""
    value_bytes = VALUE_BYTES[precision]
    # Under autocast each trained matrix is cast once a step, and the copy lives as long as the forward's results.
    copies = trained * value_bytes if precision != "fp32" else 0
    weights = trained * 4 + frozen * value_bytes + copies
    gradients = trained * 4
    state = round(trained * optimizer_bytes(optimizer))
    kept = arithmetic.saved_activation_bytes(spec, tokens, value_bytes, recompute)
    logits = min(_LOGITS_BYTES, 2 * 4 * tokens * spec.vocab_size) + tokens * spec.hidden_size * 4
    held = weights + gradients + state + kept + logits
    return Memory(weights, gradients, state, kept, logits, BASE_BYTES[device] + round(_FRAGMENTATION * held))


def optimizer_bytes(optimizer: Optimizer) -> float:
    """Returns the bytes of optimiser state for each trained parameter."""
    match optimizer.kind:
        case "adamw":
            return 8.0
        case "adamw_8bit":
            # Two 8-bit averages and their scales: one fp32 for each block of 256 values, twice.
            return 2.0 + 2 * 4 / 256
        case "sgd":
            return 4.0 if optimizer.momentum else 0.0
        case "adafactor":
            # A row and a column for each matrix: a thousandth of AdamW's at ordinary widths.
            return 0.01
        case "muon":
            # One average for the matrices; embeddings and norms have AdamW's two, hence the upper bound.
            return 8.0
