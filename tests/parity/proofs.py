"""What tests of this folder stand for, and what of it was found: the file that `stoker.arch.support` reads.

A test marked `proves("packing")` stands for that property of the model type that it is about: its parameter
`model_type`, or the mark's argument of that name. Tests of one cell must all pass.
"""

import json
import tomllib
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[2] / "src" / "stoker" / "arch" / "support.toml"
COLLECTED = pytest.StashKey[dict]()
"""Id of each collected test that proves something to its (model type, property) pairs."""

_HEAD = """\
# What tests found of each model type on tiny checkpoints; `pytest tests/parity --record` writes it.
# A native type is held to Transformers' class; a borrowed one to the same class without our parts, and with PEFT.
"""


def of_test(item):
    """The (model type, property) pairs that a test stands for."""
    return [
        (mark.kwargs.get("model_type") or item.callspec.params["model_type"], name)
        for mark in item.iter_markers("proves")
        for name in mark.args
    ]


def results(reports):
    """Returns what was found, {model type: {property: True, or how it is there}}, and the cells that a test failed."""
    cells, failed = {}, set()
    for report in reports:
        properties = dict(report.user_properties)
        for model_type, name in properties.get("proves", ()):
            value = properties.get("found", {}).get(name, True)
            facts = cells.setdefault(model_type, {})
            facts[name] = value if facts.get(name, True) is True else facts[name]
            if report.failed:
                failed.add((model_type, name))
    for model_type, name in failed:
        del cells[model_type][name]
    return cells, failed


def differing(cells):
    """The cells that RECORD holds otherwise, or not."""
    held = tomllib.loads(RECORD.read_text(encoding="utf-8"))
    return [
        f"{model_type}: {name}"
        for model_type, facts in cells.items()
        for name, value in facts.items()
        if _kept(held.get(model_type, {}).get(name), value) != held.get(model_type, {}).get(name)
    ]


def record(cells, failed):
    """Writes what was found; cells of which no test ran stay as they are."""
    held = tomllib.loads(RECORD.read_text(encoding="utf-8"))
    for model_type, facts in cells.items():
        before = held.setdefault(model_type, {})
        before |= {name: _kept(before.get(name), value) for name, value in facts.items()}
    for model_type, name in failed:
        held.get(model_type, {}).pop(name, None)
    lines = [f"{json.dumps(model_type)} = {{ {_fields(facts)} }}\n" for model_type, facts in sorted(held.items())]
    RECORD.write_text(_HEAD + "".join(lines), encoding="utf-8")


def _kept(held, value):
    """What stays: a test that says "there" leaves it to another how."""
    return held if value is True and isinstance(held, str) else value


def _fields(facts):
    return ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in sorted(facts.items()))
