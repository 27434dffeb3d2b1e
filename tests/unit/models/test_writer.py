import errno
import hashlib
import json

import pytest
import torch
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


def test_a_full_disk_leaves_no_partial_file_and_no_config(tmp_path, monkeypatch):
    def fail(descriptor, piece):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("stoker.checkpoint.durable.os.write", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write(TENSORS, tmp_path, config={})
    assert list(tmp_path.iterdir()) == []


def test_values_are_read_when_they_are_written_and_must_have_the_shape_that_was_said(tmp_path):
    values, asked = dict(TENSORS), []

    def read(name):
        asked.append(name)
        return values[name]

    shapes = [(name, torch.empty_like(tensor, device="meta")) for name, tensor in TENSORS]
    hashes = write(shapes, tmp_path / "x", config={}, max_shard_bytes=40, read=read)
    assert asked == ["a", "b", "c"]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in hashes} == {
        path.name: hash_ for path, hash_ in hashes.items()
    }
    assert torch.equal(load_file(tmp_path / "x" / "model-00002-of-00002.safetensors")["c"], values["c"])
    values["b"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"b is torch.float32 \[5\], not torch.float32 \[4\]"):
        write(shapes, tmp_path / "y", config={}, read=read)
    assert list((tmp_path / "y").iterdir()) == []


def test_the_models_dtype_is_that_of_most_of_its_bytes(tmp_path):
    tensors = [("scale", torch.ones(2)), ("packed", torch.ones(50, dtype=torch.uint8)), ("w", torch.ones(9).half())]
    write(tensors, tmp_path, config={})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
