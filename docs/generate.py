"""Writes what is generated: pages from the schema, the registry and Axolotl's keys, the README's tables from results.

`python -m docs.generate`, or with `--check` fails on drift.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docs import choosing, from_axolotl, plan_anchors

from stoker.arch import support
from stoker.cli.init import Answers, starter
from stoker.config import describe, foreign
from stoker.config.schema import DEFAULT_KINDS, RunConfig, Section
from stoker.config.show import inline

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
MODELS = ROOT / "docs" / "models.md"
FROM_AXOLOTL = ROOT / "docs" / "from_axolotl.md"
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
PLAN = ROOT / "docs" / "plan.md"
CHOOSING = ROOT / "docs" / "choosing.md"
MAIN_JOB = ROOT / "benchmarks" / "results" / "main_job.json"
SINGLE_GPU = ROOT / "benchmarks" / "results" / "single_gpu.json"
LIMITS = ROOT / "benchmarks" / "results" / "limits.json"
ARCHITECTURES = ROOT / "benchmarks" / "results" / "architectures.json"

_LONG_ERROR = 60

_HEAD = """\
# The YAML of a run

<!-- Written by `python -m docs.generate` from src/stoker/config/sections; change those files, not this page. -->

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


_MODELS_HEAD = """\
# Which models train

<!-- Written by `python -m docs.generate` from src/stoker/arch/support.py and support.toml; change those, not this. -->

`stoker models` prints this table, `stoker models NAME` says which path a model takes, and why.

- **native**: Stoker's own `Decoder`, from a family's file ([add one](add_an_architecture.md)). Layers shaped as Llama's
  run as one operation each (**kernel**), others op by op.
- **borrowed**: any other causal language model that Transformers can load. Its class computes, unpatched; on that one
  instance linear layers, gated feed-forwards, norms, attention and the head are ours where a check on loading finds
  the same numbers. What a class does not bear it keeps, and the run says so.
- **packing by document**: rows are not packed unless asked for, and then their documents run one after the other.
- **generation from the whole text**: the class has no state to decode from step by step, so each token runs all again.
- The rows below are what tests find on tiny checkpoints of each type. A model type that is not among them is looked at
  when it is loaded. A native type whose `config.json` asks for what its family does not compute is borrowed.
- Many models are another's type: `llama` is Llama 1 to 3.3, Yi, DeepSeek LLM and Coder, SmolLM 1 and 2, Falcon 3 and
  others; `mistral` is Mistral, Nemo and Ministral 8B; `qwen2` is Qwen 2, 2.5 and QwQ; `phi3` is Phi 3, 3.5 and 4;
  `gpt_neox` is Pythia; `cohere2` is Command R7B and A. A model's type is `model_type` in its `config.json`.
- Encoders, pairs of encoder and decoder, and models of images or sound are refused. A class of several kinds that
  Transformers counts among causal language models, as Gemma 3's (`gemma3`), is borrowed and trains on text alone.
- Borrowed weights must be unquantised safetensors; `model.quantization` makes NF4, int8 or fp8 of them on the way to
  the device, while the host holds the whole model once.

## Code that comes with a model

A model whose `config.json` names code of its own (`auto_map`), and for which Transformers has no class, is refused:
that code would run with all your rights. A native type (`internlm2`, `minicpm`) needs none of it, whatever `auto_map`
says. Read it, then allow it:

```yaml
model:
  base: owner/name
  revision: 0123456789abcdef0123456789abcdef01234567   # the commit whose code you read; a folder needs none
  trust_remote_code: true
```

## The table
"""


def models_page() -> str:
    """Returns the page on model types."""
    head = ("model type", "path", "family", *(column.replace("_", " ") for column in support.COLUMNS))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in support.rows():
        cells = (f"`{row.model_type}`", row.path, row.family, *row.cells())
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([_MODELS_HEAD, *lines, "", *_tested(), ""])


def _tested() -> list[str]:
    """Returns what all types of each path are tested for."""
    lines = []
    for path, beside in (
        ("native", "Transformers' class"),
        ("borrowed", "the plain class, with PEFT where there are adapters"),
    ):
        held = [set(row.held_to) for row in support.rows() if row.path == path]
        names = ", ".join(sorted(set.intersection(*held)))
        lines.append(f"Each of the {len(held)} {path} types is tested beside {beside}, for: {names}.\n")
    return lines


def readme() -> str:
    """Returns the README with its tables of speed renewed from the committed results."""
    return _with_tables(README, {"main_job": _main_job_table(), "single_gpu": single_gpu_table(SINGLE_GPU)})


def benchmarks_page() -> str:
    """Returns the page on benchmarks with its tables renewed from the committed results."""
    architectures = single_gpu_table(ARCHITECTURES, suite="architectures")
    return _with_tables(BENCHMARKS, {"architectures": architectures, "limits": _limits_table()})


def plan_page() -> str:
    """Returns the page on plans with its tables of published figures renewed from the plan's formulas."""
    return _with_tables(PLAN, {"anchors": plan_anchors.tables() + "\n"})


def choosing_page() -> str:
    """Returns the page on which engine to take with its YAMLs and plans renewed."""
    return _with_tables(CHOOSING, choosing.blocks())


def _with_tables(page: Path, tables: dict[str, str]) -> str:
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table}{end}{after}"
    return text


def single_gpu_table(path: Path, *, suite: str = "single_gpu") -> str:
    """Returns the last result of each cell of a suite of the single-GPU benchmark, the last beside others where there
    is one; nothing when none is there."""
    if not path.is_file():
        return ""
    every = json.loads(path.read_text(encoding="utf-8"))["runs"]
    # A trainer is compared with others in one run alone: a later one without them does not take its place.
    runs = {facts["cell"]: facts for facts in sorted(every, key=lambda one: len(one["results"]) > 1)}
    lines = ["| | work | Stoker | of the floor | peers |", "|---|---|---|---|---|"]
    for cell, facts in sorted(runs.items()):
        ours, *others = facts["results"]
        lines.append(
            f"| {cell} | {facts['title'].replace('shape:', '')}, {facts['rows']} | {_speed_and_memory(ours)} "
            f"| {_share_of_floor(ours)} | {'; '.join(map(_beside, others)) or 'none'} |"
        )
    lines.append(
        f"\n{_where(runs.values())}. The floor is the time of the step's matrix products and attention alone, measured "
        "in the same run; in brackets, with every layer computed twice. Made by `python benchmarks/single_gpu/run.py"
        + ("`." if suite == "single_gpu" else f" --suite {suite}`.")
    )
    return "\n".join(lines) + "\n"


def _speed_and_memory(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_bytes'] / 2**30:.1f} GiB"


def _share_of_floor(row: dict[str, Any]) -> str:
    again = row["share_of_recomputed_floor"]
    return f"{row['share_of_floor']:.0%}" + (f" ({again:.0%})" if again else "")


def _beside(row: dict[str, Any]) -> str:
    name = {"hf": "Transformers + PEFT", "liger": "with Liger", "unsloth": "Unsloth"}[row["name"]]
    if row["error"]:
        return f"{name}: no result ({_why(row['error'])})"
    ratios = f"**{row['stoker_speed_ratio']:.2f} x** its speed, {row['stoker_memory_ratio']:.2f} x its memory"
    return f"{name}: {_speed_and_memory(row)} ({ratios})"


def _why(error: str) -> str:
    """An error in a few words, for a table."""
    if "out of memory" in error:
        return "out of memory"
    return error if len(error) < _LONG_ERROR else f"{error[:_LONG_ERROR]}..."


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
    return "\n".join(lines) + "\n"


def _limits_table() -> str:
    lines = ["| work | limit | takes | a step | on the host |", "|---|---|---|---|---|"]
    rows = [row for row in json.loads(LIMITS.read_text(encoding="utf-8"))["results"] if not row["error"]]
    for row in rows:
        tensors, taken = (
            row["peak_allocated_bytes"] / 2**30,
            (row["peak_reserved_bytes"] + row["outside_bytes"]) / 2**30,
        )
        host = f"{row['host_bytes'] / 2**30:.1f} GiB" if row["host_bytes"] else ""
        lines.append(
            f"| {row['title']}, {row['rows']} x {row['tokens']:,} | {row['limit_gib']:g} GiB "
            f"| {taken:.1f} GiB, of which tensors {tensors:.1f} | {row['step_seconds']:.1f} s | {host} |"
        )
    return "\n".join([*lines, f"\n{_where(rows)}."]) + "\n"


def _where(runs: Iterable[dict[str, Any]]) -> str:
    """On which devices, with which torch and at which commits runs were made."""
    made = {(facts["device"], facts["versions"]["torch"], facts["commit"]) for facts in runs}
    return "; ".join(f"{device}, torch {torch}, commit {commit}" for device, torch, commit in sorted(made))


def main() -> int:
    """Writes the pages; with `--check` compares them instead and returns 1 on drift."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page differs from what would be written")
    check = parser.parse_args().check
    pages = {
        PAGE: page,
        MODELS: models_page,
        FROM_AXOLOTL: from_axolotl.page,
        README: readme,
        BENCHMARKS: benchmarks_page,
        PLAN: plan_page,
        CHOOSING: choosing_page,
    }
    drifted = [path for path, text in pages.items() if not _is_same(path, text())]
    for path in drifted:
        if check:
            sys.stderr.write(f"{path.name} differs from what it is made from. Run: python -m docs.generate\n")
        else:
            path.write_text(pages[path](), encoding="utf-8")
    return 1 if check and drifted else 0


def _is_same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
