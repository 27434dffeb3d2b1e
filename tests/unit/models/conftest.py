import json

import pytest
from safetensors.torch import load_file, save_file

from stoker.arch.families import read
from stoker.models import native

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def config():
    return dict(CONFIG)


@pytest.fixture
def folder(tmp_path):
    """A model's folder with one safetensors file."""
    spec = read(CONFIG, "config.json")
    native.save(native.build(spec), spec, tmp_path / "model", config=CONFIG)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    """A model's folder with an index and several shards."""
    spec = read(CONFIG, "config.json")
    native.save(native.build(spec), spec, tmp_path / "sharded", config=CONFIG, max_shard_bytes=8_000)
    return tmp_path / "sharded"


@pytest.fixture
def change_tensors():
    """A function that rewrites a folder's tensors: names to tensors, None to leave one out."""

    def change(folder, changes):
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)

    return change


@pytest.fixture
def change_index():
    """A function that rewrites the index of a sharded folder through a function of its weight map."""

    def change(folder, function):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        function(index["weight_map"])
        path.write_text(json.dumps(index))

    return change
