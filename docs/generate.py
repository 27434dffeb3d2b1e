"""Writes `docs/configuration.md` from the schema: `python -m docs.generate`, or `--check` to fail on drift."""

import argparse
import re
import sys
from pathlib import Path

from stoker.cli.init import Answers, starter
from stoker.config import describe, foreign
from stoker.config.schema import DEFAULT_KINDS, RunConfig, Section
from stoker.config.show import inline

PAGE = Path(__file__).parent / "configuration.md"

_HEAD = """\
# The YAML of a run

<!-- Written by `python -m docs.generate` from src/stoker/config/schema.py; change the schema, not this page. -->

`stoker init` writes a starter, `stoker check run.yaml` finds every mistake in it, `stoker train run.yaml` runs it.

```yaml
{example}```

- Unknown keys are refused, with a suggestion; nothing is ignored. A value is never converted: `"32"` is not a number.
- YAML is read by the rules of YAML 1.2: `2e-5` is a number, and only `true` and `false` are booleans.
- `--set train.learning_rate=1e-4` overrides any setting of any command that reads a YAML; an entry of a list is named
  by its number, counted from 0: `--set data.train.0.limit=100`.
- The run's folder keeps the resolved configuration, `config.yaml`, which says where each value came from.
- **required** settings have no default; `null` means "not set".
"""


def page() -> str:
    """Returns the whole page."""
    example = starter(Answers(), file=Path("run.yaml"))
    parts = [_HEAD.format(example=example)]
    for name, field in RunConfig.model_fields.items():
        sections = describe.sections(describe.annotations(RunConfig)[name])
        parts.append(f"## {name}\n\n{_sentence(field.description)}\n")
        parts += [_section(section, name, level=3 if len(sections) > 1 else 2) for section in sections]
    parts.append(_other_trainers())
    return "\n".join(parts)


def _section(section: type[Section], path: str, *, level: int) -> str:
    """Returns the table of a section's settings, then the sections inside it."""
    kind = describe.kind_of(section)
    lines: list[str] = []
    if kind:
        default = " (the default kind)" if kind in DEFAULT_KINDS else ""
        lines += [f"{'#' * level} {path}: {kind}\n", f"{_sentence(section.__doc__)}{default}\n"]
    names = [name for name in section.model_fields if not (kind and name == "kind")]
    if names:
        lines += ["| setting | may be | default | |", "|---|---|---|---|", *(_row(section, name) for name in names), ""]
    for name in names:
        inner = describe.sections(describe.annotations(section)[name])
        inside = f"{path}.{name}"
        if inner and not _is_same_as_another(section, name):
            if len(inner) == 1:
                lines += [f"### {inside}\n", f"{_sentence(inner[0].__doc__)}\n"]
            lines += [_section(each, inside, level=3) for each in inner]
    return "\n".join(lines)


def _is_same_as_another(section: type[Section], name: str) -> bool:
    """Whether the setting holds the section that one before it holds (`data.validation` and `data.train`)."""
    annotations = describe.annotations(section)
    earlier = list(annotations)[: list(annotations).index(name)]
    return any(describe.sections(annotations[name]) == describe.sections(annotations[other]) for other in earlier)


def _row(section: type[Section], name: str) -> str:
    field = section.model_fields[name]
    allowed = describe.expectation(describe.annotations(section)[name]).replace("a section with ", "")
    if describe.sections(describe.annotations(section)[name]) and "kind" not in allowed and "list" not in allowed:
        allowed = "a section"
    default = "**required**" if field.is_required() else f"`{_default(field.get_default(call_default_factory=True))}`"
    return f"| `{name}` | {_cell(allowed)} | {_cell(default)} | {_cell(_sentence(field.description))} |"


def _default(value: object) -> str:
    if isinstance(value, Section):
        given = {"kind": getattr(value, "kind", None)} | value.model_dump(exclude_unset=True)
        return "{" + ", ".join(f"{name}: {inline(item)}" for name, item in given.items() if item is not None) + "}"
    return inline(value)


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _other_trainers() -> str:
    rows = [f"| `{theirs}` | `{ours}` |" for theirs, ours in foreign.SAME_THING.items()]
    head = "## Names from other trainers\n\nNot accepted, but `stoker check` knows what they mean:\n"
    return "\n".join([head, "| there | here |", "|---|---|", *rows, ""])


def main() -> int:
    """Writes the page; with `--check` compares it instead and returns 1 on drift."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page differs from what would be written")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    sys.stderr.write(f"{PAGE.name} differs from the schema. Run: python -m docs.generate\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
