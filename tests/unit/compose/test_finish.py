import os
import sys
from pathlib import Path

import pytest

from stoker.compose.finish import program


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with a runnable `stoker`, which is the one that runs, and a working directory beside it."""
    script = tmp_path / "env" / "bin" / "stoker"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    monkeypatch.setenv("PATH", os.defpath)
    return script.parent


def test_a_program_that_the_shell_would_not_find_is_named_by_its_path(scripts):
    assert program() == str(Path("env/bin/stoker"))


def test_a_program_on_the_path_is_named_plainly(scripts, monkeypatch):
    monkeypatch.setenv("PATH", str(scripts))
    assert program() == "stoker"


def test_a_notebook_is_told_the_plain_name(scripts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py"])
    assert program() == "stoker"
