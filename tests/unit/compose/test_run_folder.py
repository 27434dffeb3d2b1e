import os
from pathlib import Path

import pytest

from stoker.compose.run_folder import RunFolder
from stoker.errors import OutputError
from stoker.observe import report
from stoker.observe.events import Evaluated
from stoker.observe.metrics import MetricsFile


@pytest.mark.parametrize("inside", ["", "runs/my-run"])
def test_a_file_in_the_way_of_the_folder_is_named_before_anything_is_done(tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="file is a file"):
        RunFolder(file / inside).check(resume=False, overwrite=True)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, text):
    folder = RunFolder(tmp_path)
    assert folder.read_json("run.json") == {}
    folder.write_json("run.json", {"before": 1})
    assert folder.read_json("run.json") == {"before": 1}
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(OutputError, match=r"run.json: the file is damaged: .* Restore it from a backup, or remove it"):
        folder.read_json("run.json")


def test_checkpoints_without_their_configuration_are_not_told_to_start_and_to_resume_by_turns(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    with pytest.raises(OutputError, match=r"config.yaml is missing, .* use --overwrite to start anew"):
        folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)
    folder.checkpoints.rmdir()
    with pytest.raises(OutputError, match="There is no run to resume"):
        folder.check(resume=True, overwrite=False)


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("name", ["run.json", "report.html", "metrics.jsonl"])
def test_a_full_disk_is_told_with_the_file_that_it_did_not_take(tmp_path, name):
    (tmp_path / {"report.html": name}.get(name, f".{name}.part")).symlink_to(FULL)
    (tmp_path / "metrics.jsonl.part").symlink_to(FULL)
    step = Evaluated(step=1, loss=1.0, num_trained_tokens=1, seconds=1.0, best=True)
    with pytest.raises(OSError, match="No space left") as raised:
        if name == "run.json":
            RunFolder(tmp_path).write_json(name, {"a": 1})
        elif name == "report.html":
            report.write(tmp_path)
        else:
            (tmp_path / name).symlink_to(FULL)
            MetricsFile(tmp_path / name).handle(step)
    assert raised.value.filename == str(tmp_path / name)


def test_a_folder_that_takes_no_files_is_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    for folder in (tmp_path, tmp_path / "runs" / "x"):
        with pytest.raises(OutputError, match=f"cannot be written: {tmp_path} takes no new files"):
            RunFolder(folder).check(resume=False, overwrite=False)
    (tmp_path / "mine").mkdir()
    RunFolder(tmp_path / "mine" / "x").check(resume=False, overwrite=False)


def test_a_folder_that_is_not_there_yet_may_be_used(tmp_path):
    RunFolder(tmp_path / "runs" / "my-run").check(resume=False, overwrite=False)
    assert not (tmp_path / "runs").exists()
