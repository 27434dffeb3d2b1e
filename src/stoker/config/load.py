"""From YAML and `--set` overrides to a `RunConfig`, with every problem at once, each with its place and its remedy."""

import copy
import difflib
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from stoker.config import deepspeed, describe, document, messages, rules
from stoker.config.axolotl.report import TranslationError
from stoker.config.axolotl.translate import Translation, is_axolotl, translate
from stoker.config.document import Path
from stoker.config.overrides import apply_override
from stoker.config.schema import RunConfig
from stoker.errors import ConfigError, Problem

_PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "model": {"base": "?"},
    "data": {"train": [{"path": "?"}]},
    "train": {"learning_rate": 1.0},
    "output": {"folder": "?"},
}
# Removing a wrong `kind` can bring up settings of the other kind: a second and third look are enough.
_MAX_MENDINGS = 3


@dataclass(frozen=True)
class Loaded:
    """A configuration and where its values came from: `run.yaml:14` or `--set a.b=c`; defaults are not listed.

    `translation`: how it came about, when the file is Axolotl's.
    """

    config: RunConfig
    origins: Mapping[Path, str] = field(default_factory=dict)
    translation: Translation | None = None


def load(path: str | pathlib.Path, overrides: Sequence[str] = (), *, allow_unknown: bool = False) -> RunConfig:
    """Returns the configuration in the YAML file at `path`, with overrides such as `train.learning_rate=1e-4`.

    A file of Axolotl's, with a `base_model` at the top level, is translated; overrides are in our terms there too.
    `allow_unknown` lets keys of such a file through that Axolotl does not know.

    Raises:
        ConfigError: the file cannot be read, or anything in it or in an override is wrong; it carries every problem
            (and is `TranslationError`, with the report, when a key of Axolotl's is refused).
    """
    return load_with_origins(path, overrides, allow_unknown=allow_unknown).config


def load_with_origins(
    path: str | pathlib.Path, overrides: Sequence[str] = (), *, allow_unknown: bool = False
) -> Loaded:
    """Returns what `load` does together with where each value came from (for `show.to_yaml`)."""
    name = str(path)
    found = document.read(_text(pathlib.Path(path)), name)
    if found.problems and found.value is None:
        raise ConfigError(found.problems)
    origins: dict[Path, str] = {key: f"{name}:{line}" for key, line in found.lines.items()}
    if is_axolotl(found.value):
        return _translated(
            found.value,
            overrides,
            lines=origins,
            where=name,
            problems=found.problems,
            allow_unknown=allow_unknown,
        )
    return _resolve(found.value, overrides, origins=origins, where=name, problems=found.problems)


def parse(values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "configuration") -> RunConfig:
    """Returns the configuration in nested mappings of the YAML's shape; paths and tuples may stand for texts and lists.

    Raises:
        ConfigError: anything is wrong; it carries every problem, and `where` stands for the file.
    """
    plain = _plain(values)
    if is_axolotl(plain):
        return _translated(plain, overrides, lines={}, where=where).config
    return _resolve(plain, overrides, origins={}, where=where, problems=[]).config


def _translated(
    values: dict[str, Any],
    overrides: Sequence[str],
    *,
    lines: Mapping[Path, str],
    where: str,
    problems: Sequence[Problem] = (),
    allow_unknown: bool = False,
) -> Loaded:
    """Returns the configuration of a file of Axolotl's, with how each of its keys became it."""
    found = translate(values, lines, file=where, allow_unknown=allow_unknown)
    problems = [*problems, *found.problems]
    if problems:
        raise TranslationError(sorted(problems, key=_line), found.report)
    # A copy, because overrides are put into it and the translation is what the file alone says.
    loaded = _resolve(copy.deepcopy(found.values), overrides, origins=dict(found.origins), where=where, problems=[])
    return Loaded(loaded.config, loaded.origins, found)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, 1, 0.7)
        fix = f"Did you mean {path.parent / close[0]}?" if close else "`stoker init` writes one to start from."
        raise ConfigError(f"There is no file {path}.", fix=fix) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder.", fix="Name the YAML file in it.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).", fix="Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, pathlib.PurePath) else value


def _resolve(
    values: Any, overrides: Sequence[str], *, origins: dict[Path, str], where: str, problems: list[Problem]
) -> Loaded:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} holds no settings.", fix="Write sections such as model, data, train; see `stoker init`."
        )
    problems = [*problems]
    for override in overrides:
        problem = apply_override(override, values, origins)
        problems += [problem] if problem else []
    _drop_empty_sections(values)
    config, found = _validate(values)
    problems += [Problem(item.what, _place(item.path, origins, where), item.fix or None) for item in found]
    if problems or config is None:
        raise ConfigError(sorted(problems, key=_line))
    return Loaded(deepspeed.applied(config), origins)


def _line(problem: Problem) -> tuple[bool, int]:
    """Order of problems: by line, those of `--set` last."""
    place = problem.where or ""
    number = place.rpartition(":")[2]
    return place.startswith("--set"), int(number) if number.isdigit() else 0


def _place(path: Path, origins: Mapping[Path, str], where: str) -> str:
    """Returns where the value, or a part of it, or else the section that should hold it, is written."""
    inside = next((origin for key, origin in origins.items() if key[: len(path)] == path), None)
    if path not in origins and inside:
        return inside
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return where


def _drop_empty_sections(values: dict[str, Any]) -> None:
    """Removes sections of which nothing is left but the heading (`engine:`), so that their defaults apply."""
    for name, value in list(values.items()):
        members = describe.members(describe.annotations(RunConfig).get(name))
        if value is None and all(describe.sections(member) == (describe.plain(member),) for member in members):
            del values[name]


def _validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[messages.Finding]]:
    """Returns the configuration, or everything that is wrong: fields first, then the rules on what is left of it."""
    config, found = _checked(values)
    whole = config or _mended(values, [item.path for item in found])
    if whole is not None:
        wrong = {item.path for item in found}
        found += [item for item in rules.findings(whole) if item.path not in wrong]
    return config, found


def _checked(values: Any) -> tuple[RunConfig | None, list[messages.Finding]]:
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        return None, messages.findings(error.errors(include_url=False), values)


def _mended(values: dict[str, Any], wrong: Sequence[Path]) -> RunConfig | None:
    """Returns the configuration without what is wrong in it, for the rules to look at the rest; None if hopeless."""
    mended = copy.deepcopy(values)
    for _ in range(_MAX_MENDINGS):
        # From the end, so that removing a list's entry does not move those still to be removed.
        for path in sorted(wrong, key=lambda path: [(isinstance(part, int), part) for part in path], reverse=True):
            _remove(path, mended)
        for section, needed in _PLACEHOLDERS.items():
            mended[section] = {**needed, **mended.get(section, {})}
        sources = mended["data"]["train"]
        mended["data"]["train"] = [{"path": "?", **source} for source in sources] or [{"path": "?"}]
        config, found = _checked(mended)
        if config is not None:
            return config
        wrong = [item.path for item in found]
    return None


def _remove(path: Path, values: Any) -> None:
    parent: Any = messages.value_at(path[:-1], values)
    if not isinstance(parent, dict) or path[-1] in parent:
        parent.pop(path[-1])
