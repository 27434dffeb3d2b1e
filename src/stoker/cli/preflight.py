"""What can be said of a run before anything is loaded: whether its names lead somewhere, and what it will do."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import stoker
from stoker.arch import families
from stoker.arch.borrowed import AnySpec
from stoker.cli import places
from stoker.config import row_formats
from stoker.config.document import Path as ConfigPath
from stoker.config.document import dotted
from stoker.config.load import Loaded
from stoker.config.schema import RunConfig, Source
from stoker.errors import ModelError, OutputError, PlanError, Problem
from stoker.plan import limits

BUILTIN = "builtin:"
_TEMPLATES = Path(stoker.__file__).parent / "data" / "templates"


def look(loaded: Loaded) -> tuple[AnySpec | None, list[Problem]]:
    """Returns the model's architecture where it lies on this disk, and what is wrong with the names in the YAML."""
    config = loaded.config
    spec, problems = _model(config)
    found = [*problems, *_files(config), *_device(config, spec), *_output(config)]
    placed = [Problem(problem.what, problem.where or loaded.origins.get(path), problem.fix) for path, problem in found]
    return spec, placed


def _model(config: RunConfig) -> tuple[AnySpec | None, list[tuple[ConfigPath, Problem]]]:
    path: ConfigPath = ("model", "base")
    base = config.model.base
    try:
        chosen = config.model
        spec = local_spec(base, trust_remote_code=chosen.trust_remote_code, overrides=chosen.overrides)
    except ModelError as error:
        return None, [(path, problem) for problem in error.problems]
    if spec is None:
        return None, []
    unreadable = _pickled_weights(Path(base).expanduser())
    stored = [unreadable] if unreadable else _stored(config, spec)
    return spec, [*((path, problem) for problem in stored), *limits.problems(config, spec)]


def _stored(config: RunConfig, spec: AnySpec) -> list[Problem]:
    """What is wrong with the weights in the model's folder, by their names, and with the tokenizer beside them."""
    from stoker.compose import stored

    folder = _model_folder(config.model.base)
    return stored.problems(folder, spec, needs_tokenizer=config.model.tokenizer is None) if folder else []


def _pickled_weights(folder: Path) -> Problem | None:
    """What is wrong with a folder whose weights are all pickled, as `models.folder` finds when it loads."""
    pickled = sorted(folder.glob("*.bin"))
    if not pickled or any(folder.glob("*.safetensors")):
        return None
    return Problem(
        f"model.base = {folder}: the only weights are pickled ({pickled[0].name}), and unpickling runs whatever code "
        "they hold.",
        fix="Convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors.",
    )


def local_spec(
    base: str, *, trust_remote_code: bool = False, overrides: Mapping[str, Any] | None = None
) -> AnySpec | None:
    """Returns the architecture of a model whose config.json lies on this disk, or None when it is still to be fetched.

    For one that no family reads, Transformers is asked, which takes a few seconds.

    Raises:
        ModelError: `base` can be no model, or its config.json is broken or of an architecture that no path can take.
    """
    folder = _model_folder(base)
    return _read_spec(folder, overrides or {}, trust_remote_code=trust_remote_code) if folder else None


def _model_folder(base: str) -> Path | None:
    """Returns the model's folder, or None when it is still to be fetched or made."""
    if base.startswith(BUILTIN):
        from stoker import builtin

        name = base.removeprefix(BUILTIN)
        if name not in builtin.model_names():
            known = ", ".join(BUILTIN + known for known in builtin.model_names())
            raise ModelError(f"model.base = {base}: there is no such built-in model.", fix=f"Known: {known}.")
        folder = builtin.default_folder(name)
        return folder if (folder / "config.json").exists() else None
    folder = Path(base).expanduser()
    if folder.is_file():
        raise ModelError(f"model.base = {base} is a file.", fix="Name the folder that holds config.json.")
    if folder.is_dir():
        return folder
    if places.may_be_model_id(base):
        return None
    what, fix = places.missing(base)
    raise ModelError(f"model.base: {what}.", fix=fix)


def _read_spec(folder: Path, overrides: Mapping[str, Any], *, trust_remote_code: bool) -> AnySpec:
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.base = {folder}: the folder holds no config.json.",
            fix="Name the folder that a model was saved in, with its config.json and *.safetensors.",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", fix="Fetch or save the model again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file} is not a JSON object.", fix="Fetch or save the model again.")
    try:
        return families.read(values | dict(overrides), str(file))
    except ModelError:
        from stoker.compose.model import read_facts

        return read_facts(folder, values, trust_remote_code=trust_remote_code)


def _files(config: RunConfig) -> Iterator[tuple[ConfigPath, Problem]]:
    """Yields what is wrong with the data's and the tokenizer's names."""
    for path, source in _sources(config):
        unreadable = _source(source, dotted(path))
        if unreadable:
            yield (*path, "path"), unreadable
        unsplit = _split(source, config, dotted(path))
        if unsplit:
            yield (*path, "split"), unsplit
        kind = row_formats.expanded(source).format
        if kind in row_formats.JUDGING:
            what = f"{dotted(path)}.format = {source.format}: the rows are {row_formats.FORMATS[kind]}"
            yield (*path, "format"), row_formats.not_learned(what, config.task.kind)
        elif not unreadable and not unsplit and (problem := _first_rows(source, config, dotted(path))):
            yield (*path, "path"), problem
        problem = _template(source.chat.chat_template, f"{dotted(path)}.chat.chat_template")
        if problem:
            yield (*path, "chat", "chat_template"), problem
    tokenizer, template = config.model.tokenizer, config.model.chat_template
    if tokenizer and not places.exists(tokenizer) and not places.may_be_model_id(tokenizer):
        what, fix = places.missing(tokenizer)
        yield ("model", "tokenizer"), Problem(f"model.tokenizer: {what}.", fix=fix)
    problem = _template(template, "model.chat_template")
    if problem:
        yield ("model", "chat_template"), problem


def _device(config: RunConfig, spec: AnySpec | None) -> Iterator[tuple[ConfigPath, Problem]]:
    """Yields what this machine has not and training would stop at; not for a YAML that names a device of others."""
    engine = config.engine
    wishes = (engine.kernels, engine.precision, engine.recompute, engine.offload_activations)
    if set(wishes) == {"auto"} and config.model.quantization == "none" and config.train.weight_dtype == "fp32":
        return  # Every device runs it, and looking may take PyTorch.
    from stoker.compose import hardware
    from stoker.plan import choose

    here = hardware.look()
    if engine.device != "auto" and here.first(engine.device) is None:
        return
    try:
        choose.check_device(config, spec, here)
    except PlanError as error:
        for problem in error.problems:
            # Its sentences begin with the setting that they are about.
            path: ConfigPath = tuple(problem.what.partition(" ")[0].split("."))
            elsewhere = (
                "" if engine.device != "auto" else " If it is for another machine, name that one's engine.device."
            )
            yield path, Problem(problem.what, fix=f"{problem.fix}{elsewhere}")


def _output(config: RunConfig) -> Iterator[tuple[ConfigPath, Problem]]:
    """Yields what is wrong with the run's folder."""
    from stoker.compose.run_folder import RunFolder

    try:
        RunFolder.of(config.output.folder).refuse_unusable()
    except OutputError as error:
        for problem in error.problems:
            yield ("output", "folder"), problem


def _template(choice: str | None, key: str) -> Problem | None:
    """What is wrong with a choice that is no shipped template's name, the tokenizer's own, Jinja itself, or a file."""
    if choice is None or "{{" in choice or "{%" in choice or choice == "tokenizer_default" or places.exists(choice):
        return None
    name = choice.removeprefix("tokenizer_default_fallback_")
    shipped = shipped_templates()
    known = [*shipped, *tomllib.loads((_TEMPLATES / "aliases.toml").read_text(encoding="utf-8"))]
    if name in known:
        return None
    close = difflib.get_close_matches(name, [*known, "tokenizer_default"], 1, 0.6)
    hint = f"Did you mean {choice.removesuffix(name)}{close[0]}? " if close else ""
    return Problem(
        f"{key} = {choice} is neither a template that comes with Stoker nor a file.",
        fix=f"{hint}Use one of {', '.join(shipped)}, or name a Jinja file.",
    )


def _split(source: Source, config: RunConfig, where: str) -> Problem | None:
    """What is wrong with a split that Stoker reads itself; the datasets library reads those of Hub datasets."""
    from stoker.compose import splits

    is_here = places.exists(source.path) or places.is_url(source.path) or source.path.startswith(BUILTIN)
    return splits.problem(source.split, where) if is_here or config.data.streaming else None


def _first_rows(source: Source, config: RunConfig, where: str) -> Problem | None:
    """What is wrong with the rows that a source here begins with; what must be fetched first is not looked at."""
    from stoker.compose import first_rows

    is_here = source.path.startswith(BUILTIN) or (places.exists(source.path) and not places.is_url(source.path))
    is_here = is_here and not any(map(places.is_url, source.data_files))
    return first_rows.problem(source, config, where) if is_here else None


def shipped_templates() -> tuple[str, ...]:
    """Returns the names of the chat templates that come with Stoker."""
    return tuple(sorted(file.stem for file in _TEMPLATES.glob("*.jinja")))


def _sources(config: RunConfig) -> list[tuple[ConfigPath, Source]]:
    found: list[tuple[ConfigPath, Source]] = [(("data", "train", i), one) for i, one in enumerate(config.data.train)]
    if isinstance(config.data.validation, list):
        found += [(("data", "validation", i), one) for i, one in enumerate(config.data.validation)]
    return found


def _source(source: Source, where: str) -> Problem | None:
    name = source.path
    if name.startswith(BUILTIN):
        from stoker import builtin

        known = [BUILTIN + known for known in builtin.row_names()]
        unknown = name not in known
        return Problem(f"{where}: there are no rows {name}.", fix=f"Known: {', '.join(known)}.") if unknown else None
    if places.is_url(name):
        return None
    if not places.exists(name):
        what, fix = places.missing(name)
        return None if places.may_be_dataset_id(name) else Problem(f"{where}: {what}.", fix=fix)
    path = Path(name).expanduser()
    if not places.is_pattern(name) and path.is_file() and path.stat().st_size == 0:
        return Problem(f"{where}: {name} is empty.", fix="Name a file with rows in it.")
    return None


def summary(config: RunConfig, spec: AnySpec | None) -> list[tuple[str, str]]:
    """Returns what the run will do, as short lines with their headings."""
    config = limits.fitted(config, spec) if spec is not None else config
    return [
        ("model", _model_line(config, spec)),
        ("trains", _trained_line(config)),
        ("data", _data_line(config)),
        ("for", _length_line(config)),
        ("output", _output_line(config)),
    ]


def _model_line(config: RunConfig, spec: AnySpec | None) -> str:
    base = config.model.base
    if spec is not None:
        from stoker.arch import arithmetic

        return f"{base}: {spec.family}, {arithmetic.num_parameters(spec) / 1e6:,.1f} million parameters"
    return base if base.startswith(BUILTIN) else f"{base}: no folder of this name here, so it is taken for a Hub id"


def _trained_line(config: RunConfig) -> str:
    adapter = config.adapter
    if adapter is None:
        return "every weight"
    name = {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    kind = config.model.quantization
    frozen = "stays frozen" if kind == "none" else f"stays frozen, in {kind}"
    return f"{name} of rank {adapter.rank} on {targets}; the base {frozen}"


def _data_line(config: RunConfig) -> str:
    data = config.data
    names = [source.path for source in data.train]
    hub = [name for name in names if not name.startswith(BUILTIN) and not places.exists(name)]
    held_out = data.validation
    if isinstance(held_out, list):
        rest = f"validated on {', '.join(source.path for source in held_out)}"
    elif held_out is None:
        rest = "no validation"
    else:
        rest = f"{held_out:.1%} held out" if isinstance(held_out, float) else f"{held_out} rows held out"
    packing = "packed into" if data.packing else "in"
    taken = f" ({', '.join(hub)}: not found here, taken for a Hub id)" if hub else ""
    return f"{', '.join(names)}{taken}; {rest}; {packing} sequences of {data.sequence_length} tokens"


def _length_line(config: RunConfig) -> str:
    train = config.train
    length, unit = (train.steps, "step") if train.steps else (train.epochs or 1.0, "epoch")
    return (
        f"{length:g} {unit}{'' if length == 1 else 's'} of {train.batch_size} sequences a step; "
        f"learning rate {train.learning_rate:g}, {train.schedule.kind} schedule, {train.optimizer.kind}"
    )


def _output_line(config: RunConfig) -> str:
    from stoker.compose.run_folder import RunFolder

    folder = RunFolder.of(config.output.folder)
    holds_run = folder.config.exists() or folder.checkpoints.exists()
    return f"{folder.path}{' (holds a run already: train with --resume or --overwrite)' if holds_run else ''}"
