from stoker.checkpoint import folder


def test_a_step_being_replaced_comes_after_its_successor(tmp_path):
    for name in ("step-000002.replaced", "step-000002", "step-000001"):
        (tmp_path / name).mkdir()
    assert [entry.path.name for entry in folder.entries(tmp_path)] == [
        "step-000002",
        "step-000002.replaced",
        "step-000001",
    ]


def test_a_checkpoint_set_aside_is_no_longer_one_but_is_still_there(tmp_path):
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003" / "state.json").write_text("{")
    aside = folder.set_aside(tmp_path / "step-000003")
    assert folder.entries(tmp_path) == []
    assert (aside / "state.json").read_text() == "{"
    (tmp_path / "step-000003").mkdir()
    assert folder.set_aside(tmp_path / "step-000003") == aside
    assert list(aside.iterdir()) == []
