"""What a user may ask for: nested, strict, frozen models; each field is documented beneath it, units in its name.

This is the authority on the YAML: `docs/configuration.md` is generated from it, error messages quote it, and unknown
keys are refused. What this version cannot do is not in it. Each part of the YAML has a file in `sections/`; all of it
is imported from here.
"""

from typing import Any

from pydantic import model_validator

from stoker.config.sections.adapter import Adapter
from stoker.config.sections.data import Chat, Data, Fields, PromptTexts, Shard, Source
from stoker.config.sections.engine import DeepSpeed, Engine, Fsdp2
from stoker.config.sections.model import Model, SpecialTokens
from stoker.config.sections.optimizer import Adafactor, AdamW, AdamW8bit, Muon, Optimizer, Sgd
from stoker.config.sections.output import Output, WeightsAndBiases
from stoker.config.sections.planning import PlannedDevice, Planning
from stoker.config.sections.schedule import Constant, Cosine, InverseSqrt, Linear, Schedule, WarmupStableDecay
from stoker.config.sections.section import DEFAULT_KINDS, Section, unless_set
from stoker.config.sections.task import Pretrain, Sft, Task
from stoker.config.sections.train import EarlyStopping, LossLimit, Train

__all__ = [
    "DEFAULT_KINDS",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "Adapter",
    "Chat",
    "Constant",
    "Cosine",
    "Data",
    "DeepSpeed",
    "EarlyStopping",
    "Engine",
    "Fields",
    "Fsdp2",
    "InverseSqrt",
    "Linear",
    "LossLimit",
    "Model",
    "Muon",
    "Optimizer",
    "Output",
    "PlannedDevice",
    "Planning",
    "Pretrain",
    "PromptTexts",
    "RunConfig",
    "Schedule",
    "Section",
    "Sft",
    "Sgd",
    "Shard",
    "Source",
    "SpecialTokens",
    "Task",
    "Train",
    "WarmupStableDecay",
    "WeightsAndBiases",
]


class RunConfig(Section):
    """A run, whole: what `stoker train run.yaml` reads."""

    model: Model
    """The model to start from."""
    adapter: Adapter | None = None
    """A low-rank adapter to train; leave it out to train every weight."""
    data: Data
    """The rows to train on, and how they become tokens."""
    task: Task = Sft()
    """What is learned from the rows."""
    train: Train
    """How long and how fast to learn."""
    engine: Engine = Engine()
    """How to run it; the plan decides what is `auto`."""
    output: Output
    """What the run leaves behind."""
    plan: Planning = Planning()
    """Your own devices and prices, for `stoker plan`."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend_on_other_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        task, data = values.get("task"), values.get("data")
        if isinstance(task, dict) and task.get("kind") == "pretrain" and isinstance(data, dict):
            values = values | {"data": {"train_on": "all", "on_long": "split"} | data}
        if isinstance(data, dict) and data.get("validation") is not None:
            values = values | {"train": unless_set(values.get("train", {}), evaluate_every_epochs=1.0)}
        return values
