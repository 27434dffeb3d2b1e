"""`stoker merge` and `stoker export`: from names to folders, progress on the screen, and the report in words."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from stoker.compose import artifact, unfinished
from stoker.compose.model import Base, open_base
from stoker.compose.run_folder import RunFolder
from stoker.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from stoker.export.streamed import Progress

_DTYPES = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge(
    name: str,
    output: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Merges the adapter that `name` stands for into its base, in `output`, and returns what was verified.

    A checkpoint's folder stands for the adapter or the whole model that it holds, by however many processes written.
    `max_shard_size`, of one file, is a number with a unit ("5GB"). `trust_remote_code` lets code that comes with the
    base run, as a run's configuration may.

    Raises:
        ConfigError: an unknown dtype or unit. ModelError: `name` is no adapter, or it does not fit. OutputError:
            `output` is not empty, or has no room.
    """
    chosen, shard_bytes = _dtype(dtype), _num_bytes(max_shard_size)
    _refuse_occupied(output)
    if not unfinished.is_checkpoint(name):
        return _merge(name, output, base=base, dtype=chosen, shard_bytes=shard_bytes, trusted=trust_remote_code)
    with unfinished.adapter(name) as folder:
        if folder is not None:
            options = {"dtype": chosen, "shard_bytes": shard_bytes, "trusted": trust_remote_code}
            return _merge(str(folder), output, base=base, called=f"the adapter of {name}", **options)
    if base is not None:
        raise ModelError(f"{name} holds a whole model, which has no base.", fix="Leave out --base.")
    return _write_model(name, output, chosen, shard_bytes)


def export(name: str, output: Path, *, dtype: str = "auto", max_shard_size: str | None = None) -> str:
    """Writes what the run or the checkpoint `name` trained to a folder of its own, and returns what was done.

    That is an adapter in PEFT's format, not merged, or a model in Transformers'; each with its tokenizer. `dtype` and
    `max_shard_size` are for a checkpoint's model.

    Raises:
        ConfigError: an unknown dtype or unit, or one for what is copied as it is. ModelError: `name` is neither a run
            that has finished nor a checkpoint. OutputError: `output` is not empty, or has no room.
    """
    chosen, shard_bytes = _dtype(dtype), _num_bytes(max_shard_size)
    _refuse_occupied(output)
    if unfinished.is_checkpoint(name) and not unfinished.has_adapter(name):
        return _write_model(name, output, chosen, shard_bytes)
    if chosen is not None or shard_bytes is not None:
        raise ConfigError(
            "--dtype and --max-shard-size are for the model of a checkpoint.",
            fix="Leave them out: adapters and finished models are written as they are.",
        )
    if unfinished.is_checkpoint(name):
        return unfinished.write_adapter(name, output)
    return _copy(name, output)


def _merge(
    name: str,
    output: Path,
    *,
    base: str | None,
    dtype: str | None,
    shard_bytes: int | None,
    trusted: bool,
    called: str | None = None,
) -> str:
    """`called`: what people know the adapter as, if not by its folder."""
    _require_adapter(name)
    found = artifact.find(name, base=base)
    assert found.adapter is not None
    import torch

    from stoker.export import merged
    from stoker.models.writer import DEFAULT_SHARD_BYTES

    trusted = trusted or found.trust_remote_code
    opened = _open_base(found, base, trusted)
    with _progress() as progress:
        report = merged.merge(
            opened.folder,
            found.adapter,
            output,
            dtype=getattr(torch, dtype) if dtype else None,
            trust_remote_code=trusted,
            overrides=found.overrides,
            max_shard_bytes=shard_bytes or DEFAULT_SHARD_BYTES,
            progress=progress,
        )
    written = str(report.dtype).removeprefix("torch.")
    return (
        f"merged {report.num_layers} layers of {called or found.adapter} into {found.base}, in {written}\n"
        f"verified: logits differ from adapter and base by {report.max_difference:.2g} at most "
        f"(allowed {report.tolerance:.2g}; the adapter itself moves them by {report.adapter_effect:.2g})\n"
        f"written to {report.folder}{_note(found, base)}"
    )


def _open_base(found: artifact.Artifact, base: str | None, trusted: bool) -> Base:
    """The base, with a word on --base where the one that the adapter names cannot be opened."""
    try:
        return open_base(found.base, revision=found.revision, trust_remote_code=trusted)
    except ModelError as error:
        if base is not None:
            raise
        first, *others = error.problems
        fix = f"{first.fix or ''} If the adapter's base lies elsewhere now, name it with --base.".strip()
        raise ModelError([replace(first, fix=fix), *others]) from error


def _write_model(name: str, output: Path, dtype: str | None, shard_bytes: int | None) -> str:
    with _progress() as progress:
        return unfinished.write_model(name, output, dtype=dtype, max_shard_bytes=shard_bytes, progress=progress)


def _copy(name: str, output: Path) -> str:
    from stoker.export.new_folder import new_folder

    run = RunFolder(Path(name).expanduser())
    if not run.config.is_file():
        raise ModelError(
            f"{name} is neither the folder of a run nor one of its checkpoints.",
            fix="Name the output.folder of a run, or RUN/checkpoints/step-...",
        )
    found = artifact.find(name)
    source = found.adapter or run.model
    needed_bytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    with new_folder(output, needed_bytes=needed_bytes) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)
    return f"copied the {'adapter' if found.adapter else 'model'} of {name} to {output}"


def _dtype(name: str) -> str | None:
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name!r} is not a number format.", fix=f"Use one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _num_bytes(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)\s*", size.upper())
    num_bytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if num_bytes < 1:
        raise ConfigError(f"--max-shard-size {size!r} is no size.", fix="Write a number with a unit: 5GB, 500MB.")
    return num_bytes


def _refuse_occupied(output: Path) -> None:
    """Before anything is read, which may take long."""
    from stoker.export.new_folder import refuse_occupied

    refuse_occupied(output)


@contextmanager
def _progress() -> "Iterator[Progress]":
    """Shows on a terminal what is being done and how much of it is left."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _require_adapter(name: str) -> None:
    """Raises ModelError, saying what there is, unless `name` is the folder of an adapter or of a run's."""
    folder = Path(name).expanduser()
    run = RunFolder(folder)
    if (folder / "adapter_config.json").is_file() or (run.adapter / "adapter_config.json").is_file():
        return
    names = "Name a run's folder, an adapter's folder, or a checkpoint (RUN/checkpoints/step-...)."
    if not folder.is_dir():
        what = "this is a file, not a folder." if folder.exists() else "there is no such folder."
        raise ModelError(what, where=name, fix=names)
    whole = next((path for path in (folder, run.model) if (path / "config.json").is_file()), None)
    if whole is not None:
        what = "there is no adapter here, so there is nothing to merge."
        raise ModelError(what, where=name, fix=f"The whole model is in {whole}: use it as it is.")
    steps = sorted([*folder.glob("step-*"), *run.checkpoints.glob("step-*")])
    if steps:
        fix = f"Merge its last checkpoint, {steps[-1]}, or finish the run with stoker train RUN.YAML --resume."
        raise ModelError("there is no adapter here yet, only checkpoints.", where=name, fix=fix)
    raise ModelError("there is no adapter here.", where=name, fix=names)


def _note(found: artifact.Artifact, base: str | None) -> str:
    """What to know of an adapter whose base was quantised, or is not the one that it names."""
    notes = []
    if found.quantization not in (None, "none"):
        notes.append(
            f"the adapter was trained on {found.base} in {found.quantization} and is merged into the weights as the "
            "folder holds them, so answers differ slightly from those of stoker chat on the run"
        )
    if base is not None and found.adapter is not None:
        named = _named_base(found.adapter)
        if named is not None and named != base:
            notes.append(f"the adapter names {named} as its base; that {base} holds the same weights was not checked")
    return "".join(f"\nnote: {note}" for note in notes)


def _named_base(folder: Path) -> str | None:
    """The base that an adapter names; None where it names none."""
    from stoker.export.adapter import base_of

    try:
        return base_of(folder)[0]
    except ModelError:
        return None
