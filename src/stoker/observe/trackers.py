"""Experiment trackers as observers: TensorBoard, Weights & Biases, MLflow. Each is imported only when asked for."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker.errors import ConfigError
from stoker.observe.events import Evaluated, Event, StepLogged
from stoker.observe.observer import Observer

INSTALL = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_LEFT_OUT = {"step", "total_steps", "metrics"}


def is_installed(name: str) -> bool:
    """Whether the tracker's package can be imported."""
    return importlib.util.find_spec(INSTALL[name]) is not None


def build(
    names: Sequence[str],
    folder: Path,
    *,
    run_name: str,
    config: Mapping[str, Any],
    wandb: Mapping[str, str | None] | None = None,
) -> list[Observer]:
    """Returns one observer per tracker name; `wandb`: project, entity, name, run_id and mode of that tracker.

    Raises:
        ConfigError: a tracker is unknown, or its package is not installed.
    """
    makers: dict[str, Callable[[], Observer]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(folder, run_name, config, wandb or {}),
        "mlflow": lambda: MLflow(run_name, config),
    }
    for name in names:
        if name not in makers:
            raise ConfigError(f"output.trackers: {name!r} is not a tracker.", fix=f"Choose from {', '.join(makers)}.")
        if not is_installed(name):
            raise ConfigError(
                f"output.trackers names {name}, which is not installed.",
                fix=f"Run: pip install {INSTALL[name]}, or take it out of output.trackers.",
            )
    return [makers[name]() for name in names]


def scalars(event: Event) -> tuple[int, dict[str, float]]:
    """Returns the step and the named numbers that a tracker records for an event; none for other events."""
    if isinstance(event, StepLogged):
        fields = [field.name for field in dataclasses.fields(event) if field.name not in _LEFT_OUT]
        values = {name: float(getattr(event, name)) for name in fields} | dict(event.metrics)
        return event.step, {f"train/{name}": value for name, value in values.items()}
    if isinstance(event, Evaluated):
        return event.step, {f"{event.split}/loss": event.loss}
    return 0, {}


class TensorBoard:
    """Writes scalars for TensorBoard under `folder`; look at them with `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def handle(self, event: Event) -> None:
        """Records the event's scalars."""
        step, values = scalars(event)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Logs scalars to a Weights & Biases run; where `settings` is silent, its own environment variables apply."""

    def __init__(
        self, folder: Path, run_name: str, config: Mapping[str, Any], settings: Mapping[str, str | None]
    ) -> None:
        import wandb

        given = {name: value for name, value in settings.items() if value is not None}
        name, run_id = given.pop("name", run_name), given.pop("run_id", None)
        if run_id is not None:
            given |= {"id": run_id, "resume": "allow"}
        self._run = wandb.init(dir=str(folder), name=name, config=dict(config), **given)

    def handle(self, event: Event) -> None:
        """Logs the event's scalars."""
        step, values = scalars(event)
        if values:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MLflow:
    """Logs scalars to an MLflow run; `MLFLOW_TRACKING_URI` says where."""

    def __init__(self, run_name: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=run_name)
        mlflow.log_params(dict(flatten(config)))

    def handle(self, event: Event) -> None:
        """Logs the event's scalars."""
        step, values = scalars(event)
        if values:
            self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns nested settings as `("train.learning_rate", "0.0002")` pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        pairs += flatten(value, f"{name}.") if isinstance(value, Mapping) else [(name, str(value))]
    return pairs
