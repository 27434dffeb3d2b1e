import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stoker.config import describe
from stoker.config.load import load, load_with_origins, parse
from stoker.errors import ConfigError

# Fourteen different mistakes, each in a line of its own, of fields and between fields.
WRONG = """\
model:
  base: 12
  revison: main
  quantization: 4bit
adapter:
  kind: qlora
  targets: "([a"
data:
  train: data/train.jsonl
  packing: yes
  train_on: assistent
train:
  epochs: 3
  steps: 100
  learning_rat: 2e-5
  schedule: cosine
  optimizer: {kind: adam, betas: [0.9]}
engine:
  micro_batch_size: 5
learning_rate: 3
output:
  folder: runs/x
  keep_last: 0
"""


def test_every_mistake_is_reported_at_once_with_its_line_and_a_remedy(write):
    path = write(WRONG)
    with pytest.raises(ConfigError) as caught:
        load(path)
    expected = {
        2: ("model.base = 12: must be text.", '"12"'),
        3: ("model.revison is not a setting.", "Did you mean revision?"),
        4: ("model.quantization = '4bit': must be none, nf4, int8 or fp8.", "Use nf4."),
        6: ("adapter.kind = 'qlora': must be lora or dora.", "kind: lora, and model.quantization: nf4"),
        7: ("adapter.targets = '([a' is not a regular expression", "all-linear"),
        9: ("data.train = 'data/train.jsonl': must be a list of sources", "[{path: data/train.jsonl}]"),
        10: ("data.packing = 'yes': must be true or false.", "Write true."),
        11: ("data.train_on = 'assistent'", "Did you mean assistant?"),
        14: ("train.epochs and train.steps are both set.", "Keep one"),
        15: ("train.learning_rat is not a setting.", "Did you mean learning_rate?"),
        16: ("train.schedule = 'cosine': must be a section with kind", "Write {kind: cosine}."),
        17: ("train.optimizer.kind = 'adam': must be adamw", "Did you mean adamw?"),
        19: ("engine.micro_batch_size = 5 does not divide train.batch_size = 32.", "Use 4 or 8"),
        20: ("learning_rate is not a setting.", "train.learning_rate"),
        23: ("output.keep_last = 0: must be a whole number of at least 1.", ""),
    }
    found = {problem.where: problem for problem in caught.value.problems}
    assert list(found) == [f"{path}:{line}" for line in expected]
    for line, (what, fix) in expected.items():
        assert found[f"{path}:{line}"].what.startswith(what)
        assert fix in (found[f"{path}:{line}"].fix or "")


def test_the_minimal_file_gets_defaults_that_depend_on_one_another(minimal):
    config = load(minimal)
    assert config.train.epochs == 1.0
    assert config.train.steps is None
    assert config.output.save_every_epochs == 1.0
    assert config.train.evaluate_every_epochs is None
    assert load(minimal, ["train.steps=5"]).train.epochs is None
    assert load(minimal, ["data.validation=0.1"]).train.evaluate_every_epochs == 1.0
    assert load(minimal, ["output.save_every_steps=5"]).output.save_every_epochs is None


def test_task_pretrain_learns_everything_and_splits_unless_told_otherwise(minimal):
    data = load(minimal, ["task.kind=pretrain"]).data
    assert (data.train_on, data.on_long) == ("all", "split")


def test_a_section_without_content_has_its_defaults(write):
    config = load(
        write(
            "model: {base: m}\ndata: {train: [{path: x}]}\ntrain: {learning_rate: 1e-3}\nengine:\noutput: {folder: r}\n"
        )
    )
    assert config.engine.device == "auto"


def test_a_kind_may_be_left_out_for_the_default_kind(minimal):
    assert load(minimal, ["train.schedule={floor: 0.1}"]).train.schedule.kind == "cosine"
    assert load(minimal, ["train.optimizer.weight_decay=0.1"]).train.optimizer.kind == "adamw"


def test_origins_name_line_override_or_nothing(minimal):
    origins = load_with_origins(minimal, ["train.seed=7"]).origins
    assert origins["train", "learning_rate"] == f"{minimal}:5"
    assert origins["train", "seed"] == "--set train.seed=7"
    assert ("train", "batch_size") not in origins


def test_the_configuration_cannot_be_changed(minimal):
    config = load(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 1


def test_an_empty_file_says_what_is_needed(write):
    with pytest.raises(ConfigError) as caught:
        load(write(""))
    assert [problem.what for problem in caught.value.problems] == [
        "model is missing.",
        "data is missing.",
        "train is missing.",
        "output is missing.",
    ]
    assert "learning_rate" in str(caught.value.problems[2].fix)


def test_a_file_that_is_not_there_is_named_with_the_nearest(minimal):
    with pytest.raises(ConfigError, match=r"run\.yml\. Did you mean .*run\.yaml"):
        load(minimal.with_name("run.yml"))
    with pytest.raises(ConfigError, match="is a folder"):
        load(minimal.parent)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("model: {base: caf\u00e9}".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(path)


def test_a_list_at_the_top_holds_no_settings(write):
    with pytest.raises(ConfigError, match="holds no settings"):
        load(write("- 1"))


def test_parse_takes_paths_and_tuples_from_python():
    config = parse(
        {
            "model": {"base": Path("models/m")},
            "adapter": {"targets": ("q_proj",)},
            "data": {"train": ({"path": Path("x.jsonl")},)},
            "train": {"learning_rate": 1e-3},
            "output": {"folder": Path("runs/x")},
        }
    )
    assert config.model.base == "models/m"
    assert config.adapter is not None
    assert config.adapter.targets == ["q_proj"]


ODD = [None, True, -1, 1.5, math.nan, "", "x", [], [1], [None], [[]], {}, {"kind": "x"}, {"kind": [1]}, {"a": {"b": 1}}]


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, _ in describe.walk()] + [("nope",)], ids=".".join)
def test_no_value_anywhere_ends_in_anything_but_sentences(path):
    for odd in ODD:
        values: dict[str, Any] = {
            "model": {"base": "m"},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": "x"}], "validation": [{"path": "y"}]},
            "train": {"learning_rate": 1e-3, "schedule": {"kind": "wsd"}, "optimizer": {"kind": "muon"}},
            "output": {"folder": "r"},
        }
        target: Any = values
        for part in path[:-1]:
            target = target.setdefault(part, {})
            target = target[0] if isinstance(target, list) else target
        target[path[-1]] = odd
        try:
            parse(values)
        except ConfigError as error:
            assert all(problem.what.endswith(".") for problem in error.problems)


def test_loading_imports_no_framework():
    code = "import sys, stoker.config.load; print(*{'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
