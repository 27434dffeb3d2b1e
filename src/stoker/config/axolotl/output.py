"""What a run leaves behind: trackers, and the run it goes on from."""

from typing import Any

from stoker.config.axolotl.entries import at, honoured
from stoker.config.axolotl.outcome import Outcome, Reading
from stoker.config.axolotl.values import asks


def trackers(reading: Reading) -> Outcome:
    """The switches of trackers together make one list."""
    keys = reading.whole
    uses_wandb = bool(keys.get("wandb_project")) or asks(keys, "use_wandb")
    found = [
        *(["tensorboard"] if asks(keys, "use_tensorboard") else []),
        *(["wandb"] if uses_wandb else []),
        *(["mlflow"] if asks(keys, "use_mlflow") else []),
    ]
    if not found:
        return Outcome("no effect", "off")
    return honoured({at("output.trackers"): found})


def wandb_project(reading: Reading) -> Outcome:
    """`wandb_project`: naming a project turns Weights & Biases on."""
    if reading.other("use_wandb") is not None and not asks(reading.whole, "use_wandb"):
        return Outcome("no effect", "use_wandb is false")
    settings = {**trackers(reading).settings, at("output.wandb.project"): str(reading.value)}
    return honoured(settings)


def wandb(field: str) -> Any:
    """Returns the rule of a setting of Weights & Biases, unread where that is not used."""

    def read(reading: Reading) -> Outcome:
        if not (reading.other("wandb_project") or asks(reading.whole, "use_wandb")):
            return Outcome("no effect", "no wandb_project: Weights & Biases is not used")
        return honoured({at(f"output.wandb.{field}"): str(reading.value)})

    return read


def resume(reading: Reading) -> Outcome:
    """`resume_from_checkpoint`: a folder of another trainer, or a switch."""
    if _is_true(reading.value):
        return honoured({("output", "resume"): True})
    nearest = "Use auto_resume_from_checkpoints: true, or `stoker train --resume`; a tuned adapter is lora_model_dir."
    return Outcome("refused", f"checkpoints of other trainers are not read ({reading.value}). {nearest}")


def _is_true(value: object) -> bool:
    """Whether the value is a true flag; any other text is not."""
    return value is True or str(value).lower() in ("true", "yes", "on")
