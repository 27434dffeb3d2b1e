import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stoker.compose.finish import program, save_weights
from stoker.errors import OutputError
from stoker.export import adapter


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


class Tokenizer:
    """Its files are written in Rust, which tells of a full disk with an exception of no kind."""

    def save_pretrained(self, folder):
        raise Exception("No space left on device (os error 28)")


def saved(target, monkeypatch, write):
    monkeypatch.setattr(adapter, "save", write)
    base = SimpleNamespace(name="base", revision=None)
    save_weights(base, None, Tokenizer(), target, is_adapter=True)


def fails(*arguments, **options):
    raise OutputError("the adapter cannot be written: ...") from OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write", [fails, lambda *arguments, **options: None], ids=["weights", "tokenizer"])
def test_a_full_disk_at_the_end_says_that_training_is_not_repeated(tmp_path, monkeypatch, write):
    with pytest.raises(OutputError) as raised:
        saved(tmp_path, monkeypatch, write)
    assert str(raised.value).startswith(f"{tmp_path}: the trained weights cannot be written: No space left on device. ")
    assert "--resume: the last checkpoint holds them" in str(raised.value)
