"""From the values of an Axolotl file to those of ours, with a line in the report for every key."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from stoker.config.axolotl import datasets, parallel, schedule
from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.parallel import Parallel
from stoker.config.axolotl.report import BLANK, Line, Report
from stoker.config.axolotl.table import KEYS, SECTIONS
from stoker.config.document import Path, dotted
from stoker.config.show import inline
from stoker.errors import Problem

_BLANKS: tuple[Any, ...] = (None, "", [], {})
_LENGTH = 60
# What other trainers, or people, call keys of Axolotl's whose names are not close.
_OTHER_NAMES = {
    "sequence_length": "sequence_len",
    "rank": "lora_r",
    "lora": "adapter: lora",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "lr": "learning_rate",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "per_device_train_batch_size": "micro_batch_size",
    "lr_scheduler_type": "lr_scheduler",
    "target_modules": "lora_target_modules",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "report_to": "wandb_project",
}


@dataclass
class Translation:
    """Our YAML's values, where each came from (`their.yml:14`), the report, and what is wrong.

    `notes` are the sentences of fields whose meaning shifted; `parallel` is what the file asks of many GPUs.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)
    notes: dict[Path, str] = field(default_factory=dict)
    report: Report = field(default_factory=lambda: Report(""))
    problems: list[Problem] = field(default_factory=list)
    parallel: Parallel = field(default_factory=Parallel)


def is_axolotl(values: Any) -> bool:
    """Whether a file is Axolotl's: it names a base_model at the top level, and has no section `model`."""
    return isinstance(values, dict) and "base_model" in values and "model" not in values


def translate(
    values: Mapping[str, Any], lines: Mapping[Path, str] | None = None, *, file: str, allow_unknown: bool = False
) -> Translation:
    """Returns what a file says in our terms. `lines` maps paths to `file:line`; `file` stands where there is none.

    Nothing is raised: what cannot be translated is in `problems`, each with its place. `allow_unknown` lets keys
    through that Axolotl does not know.
    """
    return _Translator(_merged(values), lines or {}, file, allow_unknown).result()


def _merged(values: Any) -> Any:
    """Returns the values with YAML's merge keys (`<<: *defaults`), which PyYAML obeys, put in their place."""
    if isinstance(values, Mapping):
        base: dict[Any, Any] = {}
        given = values.get("<<")
        for part in given if isinstance(given, list) else [given]:
            base |= _merged(part) if isinstance(part, Mapping) else {}
        return base | {key: _merged(value) for key, value in values.items() if key != "<<"}
    return [_merged(value) for value in values] if isinstance(values, list) else values


class _Translator:
    def __init__(self, values: Mapping[str, Any], lines: Mapping[Path, str], file: str, allow_unknown: bool) -> None:
        self._values = values
        self._whole = {key: value for key, value in values.items() if value not in _BLANKS}
        self._lines = lines
        self._file = file
        self._allow_unknown = allow_unknown
        self._set_by: dict[Path, str] = {}
        self._report: list[Line] = []
        self._defaults: list[tuple[Path, Any]] = []
        self._done = Translation()

    def result(self) -> Translation:
        for path, value in _keys(self._values, ()):
            self._add(path, value)
        self._check_required()
        self._note_refusals()
        if not self._done.problems:
            self._write_defaults()
            self._done.parallel = parallel.read(self._whole)
        self._done.report = Report(self._file, tuple(self._report), tuple(self._defaults))
        return self._done

    def _where(self, path: Path) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return self._lines[path[:length]]
        return self._file

    # One key

    def _add(self, path: Path, value: Any) -> None:
        entry = KEYS.get(_pattern(path))
        where = self._where(path)
        if entry is None:
            self._unknown(path, value, where)
            return
        if value in _BLANKS:
            self._report.append(Line(path, value, "no effect", BLANK, where))
            return
        try:
            outcome = entry.read(Reading(path, value, self._whole, _entry(path)))
            self._settle(path, outcome, where)
        except UnreadableError as error:
            self._refuse(path, value, error.what, error.fix, where)
            return
        line = Line(path, value, outcome.kind, outcome.text, where, outcome.note, is_cause=not outcome.follows)
        self._report.append(line)

    def _settle(self, path: Path, outcome: Outcome, where: str) -> None:
        """Writes the settings of one key. Raises UnreadableError where another key has set one to something else."""
        for ours, value in outcome.settings.items():
            self._put(ours, value, dotted(path))
            self._done.origins[ours] = where
            if outcome.note:
                self._done.notes[ours] = outcome.note

    def _put(self, path: Path, value: Any, by: str) -> None:
        if path in self._set_by and _at(path, self._done.values) != value:
            other = self._set_by[path]
            raise UnreadableError(f"{other} says otherwise: both are {dotted(path)}.", "Keep one of them.")
        self._set_by[path] = by
        _set(self._done.values, path, value)

    def _refuse(self, path: Path, value: Any, what: str, fix: str, where: str) -> None:
        self._report.append(Line(path, value, "refused", what, where, fix=fix, is_mistake=True))
        shown = "" if isinstance(value, dict | list) else f" = {_shown(value)}"
        self._done.problems.append(Problem(f"{dotted(path)}{shown}: {what}", where, fix or None))

    def _unknown(self, path: Path, value: Any, where: str) -> None:
        pattern = "datasets" if len(path) == 1 and path[0] in datasets.LISTS else _pattern(path)
        if pattern in SECTIONS or f"{pattern}[]" in SECTIONS:
            if value in _BLANKS:
                self._report.append(Line(path, value, "no effect", BLANK, where))
            else:
                self._refuse(path, value, *_layout(path, pattern, value), where)
            return
        advice = _advice(path)
        if self._allow_unknown:
            text = f"no key of Axolotl's, let through by --allow-unknown. {advice}"
            self._report.append(Line(path, value, "no effect", text, where, note=text))
            return
        self._report.append(Line(path, value, "refused", f"no key of Axolotl's. {advice}", where, is_mistake=True))
        self._done.problems.append(Problem(f"{dotted(path)} is no key of Axolotl's.", where, advice))

    # The file as a whole

    def _note_refusals(self) -> None:
        """Adds one problem for each reason to refuse, with all keys that share it; a key's own mistakes are noted."""
        causes: dict[str, list[Line]] = {}
        for line in self._report:
            if line.kind == "refused" and line.is_cause and not line.is_mistake:
                causes.setdefault(line.text, []).append(line)
        for text, lines in causes.items():
            names = ", ".join(line.name for line in lines)
            self._done.problems.append(Problem(f"{names}: {text}", lines[0].where))

    def _check_required(self) -> None:
        if not any(datasets.entries(self._whole, name) for name in ("datasets", "pretraining_dataset")):
            self._missing(("datasets",), "Name the rows to train on.")
        for name in datasets.LISTS:
            for index, entry in enumerate(datasets.entries(self._whole, name)):
                if isinstance(entry, Mapping) and entry.get("path") in _BLANKS:
                    self._missing((name, index, "path"), "Name a file, a folder or a dataset of the Hub.")
        if self._whole.get("learning_rate") is None:
            self._missing(("learning_rate",), "Set it, for example 2e-4 with an adapter, 2e-5 without.")

    def _missing(self, path: Path, fix: str) -> None:
        """Adds a problem for a key that has to be there, unless an unknown key was probably meant for it."""
        if not any(problem.fix == f"Did you mean {path[-1]}?" for problem in self._done.problems):
            self._done.problems.append(Problem(f"{dotted(path)} is missing.", self._where(path), fix))

    def _write_defaults(self) -> None:
        """Writes out what Axolotl does where a key is not there, as far as ours would do otherwise."""
        for path, value in _defaults(self._whole, self._done.values):
            if _at(path, self._done.values) is None:
                _set(self._done.values, path, value)
                self._defaults.append((path, value))
                self._done.origins[path] = "Axolotl's default"


def _defaults(keys: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    pretraining = datasets.is_pretraining(keys)
    if pretraining:
        yield ("task", "kind"), "pretrain"
        if datasets.entries(keys, "pretraining_dataset"):
            yield ("data", "streaming"), True
    else:
        yield ("data", "on_long"), "drop"
    yield ("data", "sequence_length"), 512
    yield ("data", "packing"), False
    yield ("engine", "micro_batch_size"), schedule.micro_batch(keys)
    yield ("train", "batch_size"), schedule.step_rows(keys)
    if schedule.max_steps(keys) is None:
        yield ("train", "epochs"), 1.0
    yield ("train", "schedule", "kind"), "cosine"
    warmup = schedule.default_warmup(keys)
    if warmup is not None:
        yield warmup
    train, output = values.get("train", {}), values.get("output", {})
    if schedule.has_validation(keys) and not {"evaluate_every_steps", "evaluate_every_epochs"} & set(train):
        yield schedule.once("train", "evaluate", keys)
    if not {"save_every_steps", "save_every_epochs"} & set(output):
        yield ("output", "save_every_epochs"), 1.0
    yield ("output", "keep_last"), 4
    yield ("output", "folder"), "./model-out"


def _keys(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yields every key with its value; of a section its members, of a list of sections the members of each."""
    pattern = "datasets" if len(path) == 1 and path[0] in datasets.LISTS else _pattern(path)
    if isinstance(value, Mapping) and value and (not path or pattern in SECTIONS):
        for key, inner in value.items():
            yield from _keys(inner, (*path, str(key)))
    elif isinstance(value, list) and value and (f"{pattern}[]" in SECTIONS or f"{pattern}[]" in KEYS):
        for index, inner in enumerate(value):
            yield from _keys(inner, (*path, index))
    else:
        yield path, value


def _pattern(path: Path) -> str:
    """Returns the table's name of a path."""
    parts = [*path]
    if parts and parts[0] in datasets.LISTS and (len(parts) > 1):
        parts[0] = "datasets"
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _entry(path: Path) -> Path:
    """Returns where the settings of a dataset's entry go; empty outside of datasets."""
    if len(path) > 1 and path[0] in datasets.LISTS and isinstance(path[1], int):
        return ("data", datasets.LISTS[str(path[0])], path[1])
    return ()


def _layout(path: Path, pattern: str, value: Any) -> tuple[str, str]:
    """Returns what is wrong with a value where a list or a mapping has to be, and how to write it."""
    if f"{pattern}[]" in KEYS or f"{pattern}[]" in SECTIONS:
        inner = "path: " if f"{pattern}[].path" in KEYS else ""
        example = f"- {inner}{_shown(value)}" if not isinstance(value, dict) else "a dash before the first key of each"
        return "it must be a list.", f"Write its entries beneath it: {example}"
    known = next((key for key in KEYS if key.startswith(f"{pattern}.")), "")
    shown = _shown(value) if not isinstance(value, list) and pattern == "datasets[]" else "..."
    return "it must be a mapping.", f"Write its keys beneath it, such as {known.rpartition('.')[2]}: {shown}"


def _advice(path: Path) -> str:
    """Returns what an unknown key was probably meant to be: one beside it, or one of another level."""
    parent, _, name = _pattern(path).rpartition(".")
    level = [known.removeprefix(f"{parent}.") for known in KEYS if known.rpartition(".")[0] == parent]
    level += [section for section in SECTIONS if "." not in section and not parent]
    if not parent and name in _OTHER_NAMES:
        return f"Did you mean {_OTHER_NAMES[name]}?"
    homes = [known for known in KEYS if known.rpartition(".")[2] == name]
    if homes:
        return f"It belongs elsewhere: {homes[0]}."
    near = difflib.get_close_matches(name, level, 1, 0.6) or [known for known in level if known.startswith(f"{name}_")]
    return f"Did you mean {near[0].removesuffix('[]')}?" if near else "Remove it, or look for typing mistakes."


def _at(path: Path, values: Any) -> Any:
    for part in path:
        if isinstance(values, list):
            values = values[part] if isinstance(part, int) and part < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values


def _set(values: dict[str, Any], path: Path, value: Any) -> None:
    target: Any = values
    for part, following in pairwise(path):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(target, list):
            assert isinstance(part, int)
            target.extend({} for _ in range(part + 1 - len(target)))
            target = target[part]
        else:
            target = target.setdefault(part, empty)
    target[path[-1]] = value


def _shown(value: Any) -> str:
    text = inline(value)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."
