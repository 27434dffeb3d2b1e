"""What happens during a run, as frozen records: the trainer emits them, observers show or store them.

Times are seconds, sizes are bytes, losses are means over trained tokens in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RunStarted:
    """Training begins at `first_step` (0 for a new run, the resumed step otherwise) and ends after `total_steps`."""

    total_steps: int
    first_step: int
    steps_per_epoch: int
    description: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepLogged:
    """One optimiser step, numbered from 1; `learning_rate` is the one that this step used."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    num_trained_tokens: int
    padding_share: float
    tokens_per_second: float
    memory_bytes: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """The model was evaluated after `step` steps; `split` is "validation" unless said otherwise."""

    step: int
    loss: float
    num_trained_tokens: int
    seconds: float
    split: str = "validation"
    best: bool = False


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint of the state after `step` steps stands complete in `folder`; steps waited `seconds` for it."""

    step: int
    folder: Path
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Notice:
    """A sentence the user should read: a fallback, a recovery, a split micro-batch. `level` is "info" or "warning"."""

    message: str
    level: str = "info"


@dataclass(frozen=True)
class RunEnded:
    """Training stopped after `step` steps; `reason` is "finished", "interrupted", "early stopping" or "failed"."""

    step: int
    reason: str
    seconds: float


Event = RunStarted | StepLogged | Evaluated | CheckpointSaved | Notice | RunEnded
