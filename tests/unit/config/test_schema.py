import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from stoker.config.schema import DEFAULT_KINDS, RunConfig, Train

ROOT = Path(__file__).parents[3]


def test_types_are_never_converted():
    with pytest.raises(ValidationError):
        Train.model_validate({"learning_rate": "0.1"})
    with pytest.raises(ValidationError):
        Train.model_validate({"learning_rate": 0.1, "batch_size": True})
    assert Train.model_validate({"learning_rate": 1}).learning_rate == 1.0


def test_the_kinds_that_may_be_left_out_are_those_of_the_defaults():
    fields = [RunConfig.model_fields["task"], Train.model_fields["schedule"], Train.model_fields["optimizer"]]
    assert tuple(field.default.kind for field in fields) == DEFAULT_KINDS


def test_the_page_on_the_yaml_is_that_of_the_schema():
    result = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
