"""`output`: what a run leaves behind, and where it is logged."""

from typing import Any, Literal

from pydantic import model_validator

from stoker.config.sections.section import Count, Positive, Section, Text, unless_set


class WeightsAndBiases(Section):
    """Where a run is logged; what is not set, its own environment variables and defaults say."""

    project: Text | None = None
    """Project of the run."""
    entity: Text | None = None
    """User or team that owns it."""
    name: Text | None = None
    """Name of the run; that of `output.folder` unless set."""
    run_id: Text | None = None
    """Id of the run, to go on with one."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Whether it is sent."""


class Output(Section):
    """What a run leaves behind."""

    folder: Text
    """Folder of this run: configuration, plan, metrics, checkpoints, the tuned weights, report.html."""
    save_every_steps: Count | None = None
    """Write a checkpoint every so many steps."""
    save_every_epochs: Positive | None = None
    """The same in epochs; 1 unless this or `save_every_steps` is set. The end of the run is always saved."""
    keep_last: Count = 3
    """Checkpoints kept; older ones are removed."""
    save_in_background: Literal["auto"] | bool = "auto"
    """Let steps go on while a checkpoint is written from a copy in host memory; `auto`: where there is room for it."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss, when there are validation rows."""
    trackers: Literal["auto"] | list[Literal["tensorboard", "wandb", "mlflow"]] = "auto"
    """Where curves are sent besides `metrics.jsonl`; `auto`: TensorBoard when it is installed."""
    wandb: WeightsAndBiases = WeightsAndBiases()
    """Settings of the tracker `wandb`."""
    hub_model_id: Text | None = None
    """Repository of the Hub that the tuned weights are uploaded to at the end, made private where there is none."""
    hub_revision: Text | None = None
    """Branch of it; its main branch unless set."""
    resume: bool = False
    """Go on from the last checkpoint when `folder` holds a run, as `--resume` does; start where there is none."""
    questions: list[Text] = []
    """Asked of the tuned model at the end of the run, to hear how it sounds."""

    @model_validator(mode="before")
    @classmethod
    def _in_epochs_unless_in_steps(cls, values: Any) -> Any:
        return unless_set(values, save_every_epochs=1.0)
