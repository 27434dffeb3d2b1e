import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from stoker.cli import check, init
from stoker.config.load import load
from stoker.errors import ConfigError, OutputError

app = typer.Typer()
app.command()(init.command)


def _init(*arguments: str, **options):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True, **options)


@pytest.mark.parametrize("adapter", init.ADAPTERS)
def test_the_starter_is_accepted_by_check(here, adapter, capsys):
    assert _init("--adapter", adapter).exit_code == 0
    check.command(here / "run.yaml", [])
    config = load(here / "run.yaml")
    assert (config.adapter.kind if config.adapter else "none") == adapter
    assert "is fine" in capsys.readouterr().out


def test_flags_reach_the_file_whatever_they_hold(here):
    model, data = "some/model", "my data: #1/*.jsonl"
    assert _init("-o", "a/b.yaml", "--model", model, "--data", data, "--folder", "runs/é").exit_code == 0
    config = load(here / "a" / "b.yaml")
    assert (config.model.base, config.data.train[0].path, config.output.folder) == (model, data, "runs/é")
    assert (here / "a" / "b.yaml").read_text().startswith("# stoker train a/b.yaml\n")


def test_the_sequence_is_no_longer_than_a_local_model_allows(write_run, here):
    write_run()
    assert _init("--model", "./model", "--data", "rows.jsonl", "--force").exit_code == 0
    check.command(here / "run.yaml", [])
    assert load(here / "run.yaml").data.sequence_length == 1024


def test_an_existing_file_is_kept_unless_forced(here):
    (here / "run.yaml").write_text("mine")
    result = _init()
    assert isinstance(result.exception, OutputError)
    assert "--force" in str(result.exception)
    assert (here / "run.yaml").read_text() == "mine"
    assert _init("--force").exit_code == 0
    assert load(here / "run.yaml").model.base == "builtin:tiny-llama"


def test_an_unknown_adapter_is_refused(here):
    result = _init("--adapter", "qlora")
    assert isinstance(result.exception, ConfigError)
    assert "lora, dora, none" in str(result.exception)


def test_a_place_that_cannot_be_written_is_named(here):
    (here / "file").write_text("")
    assert isinstance(_init("-o", "file/run.yaml").exception, OutputError)


def test_on_a_terminal_it_asks_for_what_is_missing(here, monkeypatch):
    monkeypatch.setattr(init, "_is_terminal", lambda: True)
    result = _init("--adapter", "none", input="some/model\nrows.jsonl\n\n")
    assert result.exit_code == 0, result.output
    config = load(here / "run.yaml")
    assert (config.model.base, config.data.train[0].path) == ("some/model", "rows.jsonl")
    assert config.output.folder == "runs/first"
    assert "Adapter" not in result.output


def test_an_unknown_answer_is_asked_again(here, monkeypatch):
    monkeypatch.setattr(init, "_is_terminal", lambda: True)
    result = _init("--model", "m", "--data", "d", "--folder", "f", input="qlora\nDoRA\n")
    assert result.output.count("Adapter") == 2
    assert load(here / "run.yaml").adapter.kind == "dora"


def test_starting_imports_no_framework(here):
    code = "import sys, stoker.cli.init; print(*{'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
