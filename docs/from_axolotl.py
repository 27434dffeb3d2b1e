"""Makes `docs/from_axolotl.md` from the table of Axolotl's keys."""

from collections.abc import Mapping
from typing import Any

from stoker.config.axolotl.optimizer import NO_OPTIMIZERS, OPTIMIZERS
from stoker.config.axolotl.outcome import KINDS
from stoker.config.axolotl.schedule import NO_SCHEDULES, SCHEDULES
from stoker.config.axolotl.table import KEYS

_HEAD = """\
# Coming from Axolotl

<!-- Written by `python -m docs.generate` from src/stoker/config/axolotl/keys; change those files, not this page. -->

A YAML with a `base_model` at the top level is Axolotl's, and every command that reads a YAML takes it as it is:

```
stoker check their.yml                  # what becomes of each key, and what will run
stoker train their.yml                  # trains
stoker train their.yml --set train.steps=20 --set model.base=builtin:tiny-llama   # overrides are in our terms
stoker convert their.yml -o run.yaml    # the same as one of our YAMLs, with comments where a meaning shifted
```

Each command begins with a report in which every key of the file has one line and one class:

| class | |
|---|---|
{classes}

- **Unknown keys** are refused at every level, with the line and what was probably meant: a misspelt key would otherwise
  do nothing. `--allow-unknown` lets them through with a warning.
- A refused key, an unknown key or a value of the wrong kind ends the command with exit code 2, before anything is
  loaded; all of them are named at once.
- A **blank** value is as if the key were not there. `yes`, `no`, `on` and `off` are booleans in such a file, numbers
  may be quoted, and merge keys (`<<: *defaults`) are obeyed, as in the YAML 1.1 that Axolotl reads.
- What Axolotl does where a key is **not there** is written out, and listed in the report's last line:
  `sequence_len` 512, no packing, rows that are too long dropped, 3% of warm-up (100 steps at most), a checkpoint an
  epoch and four of them kept.
- `train.batch_size` counts the rows of a step over **all** devices: `micro_batch_size` x `gradient_accumulation_steps`,
  times `dp_shard_size` x `dp_replicate_size` where the file names them.
- The prepared rows, the seed's order and the initial adapter are ours: a run is not the same to the last bit.

## Optimisers

| `optimizer` | becomes |
|---|---|
{optimizers}

## Schedules

| `lr_scheduler` | becomes |
|---|---|
{schedules}

## Every key

`datasets[]` stands for the entries of `datasets`, `test_datasets` and `pretraining_dataset` alike. Keys that a value
turns off (`false`, `0`) have no effect, whatever their class.

"""


def page() -> str:
    """Returns the page for users of Axolotl, with every key of its table."""
    words = "\n".join(f"| {kind} | {meaning} |" for kind, meaning in KINDS.items())
    ours = [
        f"| {', '.join(f'`{name}`' for name in names)} | `{kind}`{f'; {note}' if note else ''} |"
        for (kind, note), names in _by_value(OPTIMIZERS).items()
    ]
    refused = [
        f"| {', '.join(f'`{name}`' for name in names)} | refused. {fix}. |"
        for fix, names in _by_value(NO_OPTIMIZERS).items()
    ]
    shapes = [
        f"| {', '.join(f'`{name}`' for name in names)} | `{kind}` |" for kind, names in _by_value(SCHEDULES).items()
    ]
    shapes += [f"| `{name}` | refused. Use {nearest}. |" for name, nearest in NO_SCHEDULES.items()]
    head = _HEAD.format(classes=words, optimizers="\n".join([*ours, *refused]), schedules="\n".join(shapes))
    lines = ["| key | class | |", "|---|---|---|"]
    for (kind, means), names in _by_value({name: (entry.kind, entry.means) for name, entry in KEYS.items()}).items():
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {kind} | {means} |")
    return head + "\n".join(lines) + "\n"


def _by_value(table: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Returns the names that have the same value, in the order in which values first occur."""
    groups: dict[Any, list[str]] = {}
    for name, value in table.items():
        groups.setdefault(value, []).append(name)
    return groups
