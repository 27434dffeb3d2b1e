"""The Python API: in a notebook, what the YAML does.

    import stoker

    model = stoker.load("meta-llama/Llama-3.2-1B-Instruct")
    model.add_lora(rank=16)
    model.train(rows, learning_rate=2e-4, epochs=3)
    print(model.generate("What is LoRA?"))
    model.save("my-adapter")

A run started here leaves the same folder as `stoker train`: metrics, checkpoints, report.html, and a config.yaml that
the command line reads.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker.compose import finish
from stoker.compose.inspect import inspect_for
from stoker.compose.session import Session, open_session
from stoker.compose.train import Model as Trainee
from stoker.compose.train import RunResult, train
from stoker.compose.trainer import add_adapter
from stoker.config.load import Loaded, parse
from stoker.config.schema import Adapter
from stoker.errors import ConfigError, DataError

FORMATS = ("nf4", "int8", "fp8")
Rows = Sequence[Mapping[str, Any]] | str | Path
Messages = Sequence[Mapping[str, str]]


def load(
    name: str,
    *,
    base: str | None = None,
    device: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "Model":
    """Returns a model ready to answer and to be trained.

    `name` is a Hub id, a local folder, `builtin:tiny-llama`, an adapter's folder (with its base, or the one given as
    `base`) or a run's folder. `device` is "auto", "cpu", "cuda" or "mps". `quantization` ("nf4", "int8", "fp8") keeps
    the base's linear weights in that format, for an adapter to be trained on; None: as a run has them, or as stored.
    `revision` is a branch, tag or commit of a Hub id. `trust_remote_code` lets code that comes with the model run,
    where neither Stoker nor Transformers has its class; a Hub id then needs a commit as its revision.

    Raises:
        ModelError: it cannot be found or loaded. ConfigError: there is no such device here.
    """
    if quantization not in (None, "none", *FORMATS):
        raise ConfigError(f"quantization = {quantization!r}.", fix=f"Use one of {', '.join(FORMATS)}.")
    session = open_session(
        name,
        base=base,
        device=device,
        quantization=quantization,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return Model(session)


class Model:
    """A model with its tokenizer: add an adapter, train, generate, save."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._adapter: Adapter | None = session.adapter

    @property
    def tokenizer(self) -> Any:
        """The Transformers tokenizer."""
        return self._session.tokenizer

    @property
    def decoder(self) -> Any:
        """The torch module: `decoder(input_ids)` gives hidden states, `decoder.logits(hidden)` scores."""
        return self._session.decoder

    def add_lora(self, *, seed: int = 42, **settings: Any) -> "Model":
        """Adds a low-rank adapter and freezes the rest; returns the model.

        `settings` are those of the YAML's section `adapter`: kind ("lora" or "dora"), rank, alpha, dropout, targets,
        rank_stabilized. Raises ConfigError for a setting that does not exist or has a wrong value, or when the model
        has an adapter already; ModelError when a target names no layer.
        """
        if self._adapter is not None:
            raise ConfigError("the model has an adapter already.", fix="Train it, or load the base anew.")
        self._adapter = parse(self._values(adapter=settings), where="add_lora").adapter
        assert self._adapter is not None
        add_adapter(self.decoder, self._adapter, seed=seed)
        return self

    def inspect(
        self,
        rows: Rows,
        n: int = 3,
        *,
        data: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
    ) -> None:
        """Prints the first `n` rows as the model will see them, trained tokens in colour, and an audit of all rows.

        `rows`, `data` and `task` are those of `train`. Raises DataError when rows cannot be read, or (after they are
        shown) when training on them would learn nothing or the wrong thing.
        """
        with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
            values = self._values(
                adapter={},  # Rows look the same under any; a quantised base is refused without one.
                data={"train": _sources(Path(folder), "train", rows), **(data or {})},
                task=dict(task or {"kind": "sft"}),
            )
            inspect_for(self._session.base, self.tokenizer, parse(values, where="inspect"), rows=n)

    def train(
        self,
        rows: Rows,
        *,
        learning_rate: float,
        epochs: float | None = None,
        steps: int | None = None,
        batch_size: int = 32,
        validation: Rows | float | int | None = None,
        output: str | Path | None = None,
        data: Mapping[str, Any] | None = None,
        train_settings: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        output_settings: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
    ) -> RunResult:
        """Trains on `rows` (dicts in any format that a file may have, or a file, a Hub id) and returns how it ended.

        Trains the adapter if there is one, else every weight. `validation`: rows, a share or a count held out.
        `output`: the run's folder, a fresh one under runs/ unless given. `data`, `train_settings`, `engine`,
        `output_settings` and `task` are further fields of the YAML's sections (docs/configuration.md).

        Raises:
            UserError: settings or rows are wrong. TrainingError: training cannot go on.
        """
        folder = Path(output) if output is not None else _fresh_folder()
        held_out: Any = validation
        if validation is not None and not isinstance(validation, (int, float)):
            held_out = _sources(folder, "validation", validation)
        values = self._values(
            adapter=self._adapter.model_dump() if self._adapter else None,
            data={"train": _sources(folder, "train", rows), "validation": held_out, **(data or {})},
            train={
                "learning_rate": learning_rate,
                "epochs": epochs,
                "steps": steps,
                "batch_size": batch_size,
                **(train_settings or {}),
            },
            engine={"device": self._session.device, **(engine or {})},
            output={"folder": str(folder), **(output_settings or {})},
            task=dict(task or {"kind": "sft"}),
        )
        config = parse(values, where="train")
        session = self._session
        if self._adapter is None:
            session.decoder.float().requires_grad_(True)
        return train(Loaded(config), model=Trainee(session.base, session.tokenizer, session.decoder))

    def generate(self, prompt: str | Messages, **settings: Any) -> str:
        """Returns the answer to a prompt or to messages.

        `settings`: max_new_tokens, temperature (0: greedy), top_k, top_p, repetition_penalty, seed.
        """
        return "".join(self.stream(prompt, **settings)).strip()

    def stream(self, prompt: str | Messages, **settings: Any) -> Iterator[str]:
        """Yields the answer to a prompt (one user turn, or plain text without a chat template) or to messages."""
        if not isinstance(prompt, str):
            return self._session.stream_chat(prompt, **settings)
        if self.tokenizer.chat_template:
            return self._session.stream_chat([{"role": "user", "content": prompt}], **settings)
        return self._session.stream_text(prompt, **settings)

    def save(self, folder: str | Path) -> Path:
        """Writes the adapter in PEFT's format, or the whole model in Transformers', with the tokenizer."""
        session, target = self._session, Path(folder)
        is_adapter = self._adapter is not None
        return finish.save_weights(session.base, session.decoder, session.tokenizer, target, is_adapter=is_adapter)

    def _values(self, **sections: Any) -> dict[str, Any]:
        """Returns a configuration's values; sections that a call does not need hold what the schema asks for."""
        base = self._session.base
        needed = {
            "model": {
                "base": base.name,
                "revision": base.revision,
                "quantization": self._session.quantization,
                "trust_remote_code": getattr(base.spec, "is_remote", False),
            },
            "data": {"train": [{"path": "rows"}]},
            "train": {"learning_rate": 1e-4},
            "output": {"folder": "runs"},
        }
        return needed | {name: value for name, value in sections.items() if value is not None}


def _fresh_folder() -> Path:
    """Returns runs/notebook-N for the first N that is free."""
    return next(path for number in itertools.count(1) if not (path := Path("runs") / f"notebook-{number}").exists())


def _sources(folder: Path, name: str, rows: Rows) -> list[dict[str, str]]:
    """Returns where rows come from, as a configuration says it; rows in memory are first written below `folder`."""
    return [{"path": str(rows) if isinstance(rows, (str, Path)) else _write_rows(folder, name, rows)}]


def _write_rows(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Keeps rows given in memory beside the run, so that its config.yaml can be run again; returns the file."""
    if not rows:
        raise DataError(f"{name}: there are no rows.", fix="Pass a list of dicts.")
    path = folder / "rows" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except TypeError as error:
                raise DataError(f"row {index} cannot be written as JSON: {error}.", fix="Use dicts of text.") from error
    return str(path)
