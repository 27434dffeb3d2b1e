import json

import pytest

from stoker.checkpoint.read import load, load_latest
from stoker.checkpoint.write import save
from stoker.errors import CheckpointError


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


FILES = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [flip_a_byte, cut_off, lambda path: path.unlink(), lambda path: path.write_bytes(b"")]
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, content, name, damage):
    save(tmp_path, 1, **content(1.0))
    latest, _ = save(tmp_path, 2, **content(2.0))
    damage(latest / name)
    loaded = load_latest(tmp_path)
    assert loaded.step == 1
    assert loaded.values["fill"] == 1.0
    (rejected,) = loaded.rejected
    assert rejected.path == latest
    assert name in rejected.why


def test_a_manifest_edited_to_match_an_altered_file_is_recognised(tmp_path, content):
    save(tmp_path, 1, **content())
    latest, _ = save(tmp_path, 2, **content())
    manifest = json.loads((latest / "manifest.json").read_text())
    manifest["files"].pop("optimizer.safetensors")
    (latest / "manifest.json").write_text(json.dumps(manifest))
    (latest / "optimizer.safetensors").unlink()
    assert load_latest(tmp_path).rejected[0].why == "manifest.json was altered"


def test_a_checkpoint_renamed_to_another_step_is_not_taken_for_it(tmp_path, content):
    save(tmp_path, 1, **content())
    (tmp_path / "step-000001").rename(tmp_path / "step-000009")
    save(tmp_path, 2, **content())
    loaded = load_latest(tmp_path)
    assert loaded.step == 2
    assert loaded.rejected[0].why == "it is of step 1"


def test_when_none_is_whole_it_is_an_error_and_never_a_fresh_start(tmp_path, content):
    for step in (1, 2):
        path, _ = save(tmp_path, step, **content())
        flip_a_byte(path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"step-000002: .*altered.*step-000001: .*altered"):
        load_latest(tmp_path)


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path):
    assert load_latest(tmp_path / "missing") is None
    assert load_latest(tmp_path) is None


def test_steps_are_ordered_as_numbers(tmp_path, content):
    for step in (999_999, 1_000_000, 2):
        save(tmp_path, step, **content())
    assert load_latest(tmp_path).step == 1_000_000


def test_unfinished_and_foreign_names_are_not_checkpoints(tmp_path, content):
    save(tmp_path, 1, **content())
    for name in (".step-000002.part", "step-000003.damaged", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000004").write_text("a file")
    assert load_latest(tmp_path).step == 1


def test_one_checkpoint_can_be_loaded_by_its_path(tmp_path, content):
    path, _ = save(tmp_path, 1, **content(1.0))
    save(tmp_path, 2, **content(2.0))
    assert load(path).values["fill"] == 1.0
    flip_a_byte(path / "state.json")
    with pytest.raises(CheckpointError, match=r"not whole: state\.json was altered"):
        load(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "step-000007")
