from stoker.checkpoint.durable import DurableFile
from stoker.checkpoint.manifest import Manifest, fault_of


def test_a_whole_folder_has_no_fault_and_size_comes_before_hash(tmp_path):
    manifest = Manifest(3)
    with DurableFile(tmp_path / "a.bin") as file:
        file.write(b"12345")
    manifest.add("a.bin", file)
    (tmp_path / "manifest.json").write_bytes(manifest.to_bytes())
    assert fault_of(tmp_path, 3) is None
    (tmp_path / "a.bin").write_bytes(b"12")
    assert fault_of(tmp_path, 3) == "a.bin has 2 bytes instead of 5"
    (tmp_path / "a.bin").write_bytes(b"12346")
    assert fault_of(tmp_path, 3) == "a.bin was altered: its hash is another"


def test_a_manifest_of_another_format_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.checkpoint.folder.FORMAT", 2)
    (tmp_path / "manifest.json").write_bytes(Manifest(3).to_bytes())
    monkeypatch.setattr("stoker.checkpoint.folder.FORMAT", 1)
    assert fault_of(tmp_path, 3) == "its format is 2, this version reads 1"


def test_json_of_another_shape_is_damage(tmp_path):
    for text in ("[]", "{}", "3", '{"sha256": 1}'):
        (tmp_path / "manifest.json").write_text(text)
        assert fault_of(tmp_path, 3) in ("manifest.json is damaged", "manifest.json was altered")
