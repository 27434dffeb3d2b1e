import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stoker.errors import OutputError
from stoker.models.writer import write

TENSORS = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(4)), ("c", torch.zeros(50))]


def test_one_file_when_it_fits(tmp_path):
    write(TENSORS, tmp_path / "new" / "model", config={"x": 1, "torch_dtype": "float16"})
    folder = tmp_path / "new" / "model"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert json.loads((folder / "config.json").read_text()) == {"x": 1, "dtype": "float32"}
    assert torch.equal(load_file(folder / "model.safetensors")["a"], TENSORS[0][1])


def test_shards_are_full_and_indexed(tmp_path):
    write(TENSORS, tmp_path, config={}, max_shard_bytes=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 60
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert list(load_file(tmp_path / "model-00002-of-00002.safetensors")) == ["c"]


def test_parts_of_one_weight_are_written_apart(tmp_path):
    whole = torch.arange(8.0)
    write([("first", whole[:3]), ("second", whole[3:])], tmp_path, config={})
    assert (tmp_path / "model.safetensors").stat().st_size < 1000
    assert torch.equal(load_file(tmp_path / "model.safetensors")["second"], whole[3:])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_no_partial_file_and_no_config(tmp_path, monkeypatch, error):
    def fail(tensors, path, **options):
        path.write_bytes(b"half")
        raise error

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("stoker.models.writer.save_file", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write(TENSORS, tmp_path, config={})
    assert list(tmp_path.iterdir()) == []
