"""`train`: how long and how fast to learn."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stoker.config.sections.optimizer import AdamW, Optimizer
from stoker.config.sections.schedule import Cosine, Schedule
from stoker.config.sections.section import Count, CountOrZero, NonNegative, Positive, Section, Text, unless_set


class EarlyStopping(Section):
    """Stop when the validation loss no longer falls."""

    patience: Count
    """Evaluations without improvement after which training stops."""
    min_improvement: NonNegative = 0.0
    """How much lower the loss must be to count."""


class LossLimit(Section):
    """Stop a run that has broken down: its loss stays above a value."""

    above: Positive
    """The loss of a step that counts; about twice the loss at the start is a sign of a broken run."""
    patience: Count = 3
    """Steps above it in a row after which the run stops."""


class Train(Section):
    """How long and how fast to learn."""

    epochs: Positive | None = None
    """Passes over the training rows; 1 unless this or `steps` is set."""
    steps: Count | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: Count = 32
    """Sequences of one optimiser step, over all devices; the plan splits it into micro-batches."""
    learning_rate: Positive
    """The highest rate of the schedule. 2e-4 suits most adapters, 2e-5 most full fine-tuning."""
    embedding_learning_rate: Positive | None = None
    """The same for the embedding and the head of a model whose every weight is trained; `learning_rate` unless set."""
    lora_plus_ratio: Positive | None = None
    """The rate of adapters' B over that of their A (LoRA+, arXiv:2402.12354, which finds 16 good); 1 unless set."""
    only: Annotated[list[Text], Field(min_length=1)] | None = None
    """Train only weights whose names one of these regular expressions matches, from the name's start. The names are
    those of the model's files: `model.layers.0.self_attn.q_proj.weight`. Every weight unless set."""
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    """What trained weights, their gradients and AdamW's averages are kept in, where every weight is trained. `bf16`
    takes half the memory, at `engine.precision` bf16; AdamW then rounds stochastically, so that small updates count."""
    embedding_noise: Positive | None = None
    """Noise on the embedding's output in training (NEFTune, arXiv:2310.05914, whose alpha this is: 5 to 15); none
    unless set."""
    schedule: Schedule = Cosine(warmup_ratio=0.03)
    """How the rate changes over the run."""
    optimizer: Optimizer = AdamW()
    """How gradients become updates."""
    max_gradient_norm: Positive | None = 1.0
    """Longer gradients are scaled down to this norm; `null` leaves them as they are."""
    seed: CountOrZero = 42
    """Fixes the order of rows, the adapter's start and dropout."""
    evaluate_every_steps: Count | None = None
    """Evaluate on the validation rows every so many steps."""
    evaluate_every_epochs: Positive | None = None
    """The same in epochs; 1 when there are validation rows, unless this or `evaluate_every_steps` is set."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the end; never unless set."""
    loss_limit: LossLimit | None = None
    """When a high loss stops the run, as one that is not a number always does; never unless set."""
    log_every_steps: Count = 1
    """Steps between two lines of `metrics.jsonl`."""

    @model_validator(mode="before")
    @classmethod
    def _in_epochs_unless_in_steps(cls, values: Any) -> Any:
        return unless_set(values, epochs=1.0)
