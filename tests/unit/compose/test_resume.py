"""What a run that is resumed keeps of the plan that it began with."""

import json

import pytest

from stoker.compose.resume import engine_before, ladder_before, other_rows
from stoker.compose.run_folder import RunFolder
from stoker.config.load import parse


def test_other_rows_are_told_by_what_differs():
    before = {"data.train: the number of documents": 40, "the tokenizer (its hash)": "ab"}
    assert other_rows(before, dict(before)) == other_rows({}, before) == []
    (said,) = other_rows(before, before | {"data.train: the number of documents": 30})
    assert "began with: data.train: the number of documents was 40 and is 30. Its steps" in said


@pytest.mark.parametrize(("rows", "kept"), [(8, 4), (4, 4), (2, None), (6, None)])
def test_a_micro_batch_is_kept_where_one_processs_rows_still_fill_it(tmp_path, rows, kept):
    before = {"device_name": "a GPU", "micro_batch_size": 4, "precision": "bf16"}
    (tmp_path / "plan.json").write_text(json.dumps(before))
    config = parse(
        {
            "model": {"base": "folder"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "train": {"learning_rate": 1e-4, "batch_size": rows},
            "output": {"folder": str(tmp_path)},
        }
    )
    found = engine_before(config, RunFolder.of(str(tmp_path)), "a GPU")
    assert found.get("micro_batch_size") == kept
    assert found["precision"] == "bf16"
    assert engine_before(config, RunFolder.of(str(tmp_path)), "another") == {}


@pytest.mark.parametrize(
    ("staying", "asked", "kept"),
    [
        ({"staying_layers": 2}, "auto", 1),
        ({"staying_layers": 2}, 1, 1),
        ({"staying_layers": 2}, True, None),
        ({"staying_layers": 2}, 2, None),
        ({}, "auto", 3),  # a run of before there were such layers
        ({}, True, 3),
        ({}, 1, None),
        ({}, False, None),
    ],
)
def test_as_many_layers_wait_on_the_host_as_when_the_run_began(tmp_path, staying, asked, kept):
    ladder = {"keep": ["mixer"] * 3, "layers": "fused", "tile_tokens": None, "offload_activations": True}
    (tmp_path / "plan.json").write_text(json.dumps({"device_name": "a GPU", **ladder, **staying}))
    config = parse(
        {
            "model": {"base": "folder"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "train": {"learning_rate": 1e-4},
            "engine": {"offload_activations": asked},
            "output": {"folder": str(tmp_path)},
        }
    )
    before = ladder_before(config, RunFolder.of(str(tmp_path)), "a GPU")
    assert (None if before is None else before.num_away) == kept
