"""Writes what is generated: `docs/configuration.md` from the schema, the README's table of speed from result files.

`python -m docs.generate`, or with `--check` fails on drift.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from stoker.cli.init import Answers, starter
from stoker.config import describe, foreign
from stoker.config.schema import DEFAULT_KINDS, RunConfig, Section
from stoker.config.show import inline

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
README = ROOT / "README.md"
MAIN_JOB = ROOT / "benchmarks" / "results" / "main_job.json"

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


def readme() -> str:
    """Returns the README with its table of speed renewed from the committed results."""
    begin, end = "<!-- main_job:begin -->", "<!-- main_job:end -->"
    before, _, rest = README.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{_main_job_table()}\n{end}{after}"


def _main_job_table() -> str:
    facts = json.loads(MAIN_JOB.read_text(encoding="utf-8"))
    lines = ["| batches | Stoker | Transformers + PEFT | speed | peak memory |", "|---|---|---|---|---|"]
    for row in facts["rows"]:
        ours, theirs = (
            f"{row[f'{side}_tokens_per_second']:,} tokens/s, {row[f'{side}_peak_mib']:,.0f} MiB"
            for side in ("stoker", "baseline")
        )
        lines.append(
            f"| {row['layout']} | {ours} | {theirs} | {row['speed_ratio']:.2f} x | {row['memory_ratio']:.2f} x |"
        )
    packages = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft"))
    largest = max(row["max_loss_difference"] for row in facts["rows"])
    lines.append(
        f"\n{facts['device']}; {packages}; losses of the first 20 steps equal within {largest:.0e}. "
        "Made by `python -m benchmarks.main_job` (commit "
        f"{facts['commit']}), kept in benchmarks/results."
    )
    return "\n".join(lines)


def main() -> int:
    """Writes the pages; with `--check` compares them instead and returns 1 on drift."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page differs from what would be written")
    check = parser.parse_args().check
    drifted = [path for path, text in {PAGE: page(), README: readme()}.items() if not _is_same(path, text)]
    for path in drifted:
        if check:
            sys.stderr.write(f"{path.name} differs from what it is made from. Run: python -m docs.generate\n")
        else:
            path.write_text({PAGE: page, README: readme}[path](), encoding="utf-8")
    return 1 if check and drifted else 0


def _is_same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
