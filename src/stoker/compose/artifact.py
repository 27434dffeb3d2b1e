"""What a name on the command line stands for: a run's folder, an adapter's folder, or a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.compose.run_folder import RunFolder
from stoker.config.load import load
from stoker.config.schema import Model
from stoker.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Artifact:
    """A model to load: `base` is a folder, Hub id or builtin name; `adapter` a folder in PEFT's format, or None.

    `tokenizer` is the folder whose tokenizer goes with it, or None for the base's own. `quantization` is the format of
    the base that a run's adapter was trained on; None where no run's configuration lies beside the adapter.
    `trust_remote_code`: the run that made it was allowed to run the model's own code. `overrides`: the run's changes to
    the base's config.json.
    """

    base: str
    revision: str | None = None
    adapter: Path | None = None
    tokenizer: Path | None = None
    quantization: str | None = None
    trust_remote_code: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """One line that says what is loaded."""
        base = self.base if self.quantization in (None, "none") else f"{self.base} in {self.quantization}"
        return f"{self.adapter} on {base}" if self.adapter else base


def find(name: str, *, base: str | None = None) -> Artifact:
    """Returns what `name` stands for; `base` overrides the base that an adapter names.

    Raises:
        ModelError: a run that has not finished, an adapter whose settings cannot be read, or `base` given for a name
            that is no adapter.
    """
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, base)
    run = RunFolder(folder)
    if run.config.is_file():
        if (run.adapter / "adapter_config.json").is_file():
            return _adapter(run.adapter, base)
        if not (run.model / "config.json").is_file():
            raise ModelError(
                f"{folder} holds a run that has not finished: it has no adapter/ and no model/ yet.",
                fix="Finish it with stoker train RUN.YAML --resume, or merge one of its checkpoints.",
            )
        folder = run.model
        name = str(folder)
    if base is not None:
        raise ModelError(f"{name} is not an adapter, so it has no base.", fix="Leave out --base.")
    return Artifact(base=name, trust_remote_code=_trusts(run) if folder == run.model else False)


def _adapter(folder: Path, base: str | None) -> Artifact:
    from stoker.export.adapter import base_of

    name, revision = (base, None) if base else base_of(folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return Artifact(
        base=name,
        revision=revision,
        adapter=folder,
        tokenizer=folder if has_tokenizer else None,
        quantization=_quantization(RunFolder(folder.parent)),
        trust_remote_code=_trusts(RunFolder(folder.parent)),
        overrides=_overrides(RunFolder(folder.parent)),
    )


def _quantization(run: RunFolder) -> str | None:
    """Returns the format of the base in a run's configuration; None when there is none that can be read."""
    model = _model_of(run)
    return None if model is None else model.quantization


def _trusts(run: RunFolder) -> bool:
    model = _model_of(run)
    return model is not None and model.trust_remote_code


def _overrides(run: RunFolder) -> dict[str, Any]:
    model = _model_of(run)
    return {} if model is None else dict(model.overrides)


def _model_of(run: RunFolder) -> Model | None:
    """Returns the section `model` of a run's configuration; None when there is none that can be read."""
    if not run.config.is_file():
        return None
    try:
        return load(run.config).model
    except ConfigError:  # of a version whose settings were others
        return None
