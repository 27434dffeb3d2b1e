from stoker.checkpoint.durable import DurableFile
from stoker.checkpoint.manifest import facts_of, fault_of, to_bytes


def test_a_whole_folder_has_no_fault_and_size_comes_before_hash(tmp_path):
    with DurableFile(tmp_path / "a.bin") as file:
        file.write(b"12345")
    (tmp_path / "manifest.json").write_bytes(to_bytes(3, {"a.bin": facts_of(file)}))
    assert fault_of(tmp_path, 3) is None
    (tmp_path / "a.bin").write_bytes(b"12")
    assert fault_of(tmp_path, 3) == "a.bin has 2 bytes instead of 5"
    (tmp_path / "a.bin").write_bytes(b"12346")
    assert fault_of(tmp_path, 3) == "a.bin was altered: its hash is another"


def test_a_manifest_of_another_format_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.checkpoint.folder.FORMAT", 3)
    (tmp_path / "manifest.json").write_bytes(to_bytes(3, {}))
    monkeypatch.setattr("stoker.checkpoint.folder.FORMAT", 2)
    assert fault_of(tmp_path, 3) == "its format is 3, this version reads up to 2"


def test_ranks_that_share_the_files_find_together_what_one_finds(tmp_path):
    files = {}
    for name in ("a.bin", "b.bin", "c.bin"):
        with DurableFile(tmp_path / name) as file:
            file.write(name.encode())
        files[name] = facts_of(file)
    (tmp_path / "manifest.json").write_bytes(to_bytes(3, files))
    (tmp_path / "b.bin").write_bytes(b"B.bin")
    faults = [fault_of(tmp_path, 3, share=(rank, 2)) for rank in (0, 1)]
    assert faults == [None, "b.bin was altered: its hash is another"]


def test_json_of_another_shape_is_damage(tmp_path):
    for text in ("[]", "{}", "3", '{"sha256": 1}'):
        (tmp_path / "manifest.json").write_text(text)
        assert fault_of(tmp_path, 3) in ("manifest.json is damaged", "manifest.json was altered")
