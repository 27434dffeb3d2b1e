"""`stoker init`: write a commented YAML to start from, that `stoker check` accepts."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from stoker.errors import ConfigError, ModelError, OutputError

ADAPTERS = ("lora", "dora", "none")
_MODEL = "builtin:tiny-llama"
_DATA = "builtin:fine-tuning"
_USUAL_LENGTH = 2048


@dataclass(frozen=True)
class Answers:
    """What a starter YAML depends on."""

    model: str = _MODEL
    data: str = _DATA
    adapter: str = "lora"
    folder: str = "runs/first"


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub id, local folder or builtin:tiny-llama.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder, glob or Hub id of the rows.")] = None,
    adapter: Annotated[str | None, typer.Option(help="lora, dora, or none to train every weight.")] = None,
    folder: Annotated[str | None, typer.Option(help="Folder that the run will write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Write a commented YAML to start from; asks for what the flags leave out when on a terminal.

    Example: stoker init -o run.yaml --model meta-llama/Llama-3.2-1B --data data/train.jsonl
    """
    if adapter is not None and adapter not in ADAPTERS:
        raise ConfigError(f"--adapter {adapter!r} is not a kind of adapter.", fix=f"Use {', '.join(ADAPTERS)}.")
    if output.exists() and not force:
        raise OutputError(f"{output} exists already.", fix="Add --force to write over it, or name another with -o.")
    text = starter(_asked(model, data, adapter, folder), file=output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}.", fix="Name another file with -o.") from error
    typer.echo(f"Wrote {output}. Next: stoker check {output}, stoker inspect {output}, stoker train {output}")


def _asked(model: str | None, data: str | None, adapter: str | None, folder: str | None) -> Answers:
    """Returns the answers: flags first, then questions on a terminal, then what can run anywhere."""
    given = {"model": model, "data": data, "adapter": adapter, "folder": folder}
    answers = Answers(**{name: value for name, value in given.items() if value})
    if not _is_terminal():
        return answers
    return Answers(
        model=model or typer.prompt("Model to start from (Hub id or folder)", default=answers.model),
        data=data or typer.prompt("Rows to train on (file, folder, glob or Hub id)", default=answers.data),
        adapter=adapter or _prompt_adapter(answers.adapter),
        folder=folder or typer.prompt("Folder for the run", default=answers.folder),
    )


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _prompt_adapter(default: str) -> str:
    answer = ""
    while answer not in ADAPTERS:
        answer = str(typer.prompt(f"Adapter ({', '.join(ADAPTERS)})", default=default)).strip().lower()
    return answer


def starter(answers: Answers, *, file: Path) -> str:
    """Returns the YAML, whose first line is the command that runs it."""
    from stoker.config.show import inline

    tiny = answers.model.startswith("builtin:")
    rate = "2.0e-5" if answers.adapter == "none" else "2.0e-4"
    return _TEMPLATE.format(
        file=file,
        model=inline(answers.model),
        adapter=_FULL if answers.adapter == "none" else _ADAPTER.format(kind=answers.adapter),
        data=inline(answers.data),
        sequence_length=512 if tiny else _sequence_length(answers.model),
        rate="1.0e-3" if tiny else rate,
        folder=inline(answers.folder),
    )


def _sequence_length(model: str) -> int:
    """Returns a usual length, or the longest that a model on this disk allows."""
    from stoker.cli import preflight
    from stoker.plan import limits

    # What is wrong with the model is for `stoker check` to say.
    try:
        spec = preflight.local_spec(model)
    except ModelError:
        return _USUAL_LENGTH
    return min(_USUAL_LENGTH, limits.max_sequence_length(spec)) if spec else _USUAL_LENGTH


_ADAPTER = """\
adapter:                         # leave the section out to train every weight
  kind: {kind}                     # lora | dora
  rank: 16
  alpha: 32                      # the adapter's output is scaled by alpha / rank
  targets: all-linear            # or a list such as [q_proj, v_proj], or a regular expression
"""

_FULL = """\
# adapter: {kind: lora, rank: 16}  # take the # away to train an adapter and keep the model frozen
"""

_TEMPLATE = """\
# stoker train {file}
# Every setting: docs/configuration.md. What is not set here has its default.

model:
  base: {model}

{adapter}
data:
  train:
    - path: {data}
      format: auto               # chat | alpaca | completion; auto looks at the first rows and says what it found
  validation: 0.05               # share or count of rows to hold out, or a list of sources like train
  sequence_length: {sequence_length}
  packing: true                  # fill each sequence with whole documents, which never see one another
  train_on: assistant            # assistant | all | a list of roles

# task: {{kind: pretrain}}         # for plain text; without it, supervised fine-tuning

train:
  epochs: 3                      # or steps: 500
  batch_size: 32                 # sequences a step; the plan splits it into micro-batches
  learning_rate: {rate}
  schedule: {{kind: cosine, warmup_ratio: 0.03}}
  optimizer: {{kind: adamw, weight_decay: 0.0}}
  seed: 42

# engine:                        # device, precision, micro_batch_size, recompute: auto, and the plan says why
#   precision: fp32

output:
  folder: {folder}
  keep_last: 3                   # checkpoints kept, besides the best
  questions: []                  # asked of the tuned model at the end, for example ["What is LoRA?"]
"""
