"""A tiny Llama folder in Hugging Face's format, and adapters on it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.export import adapter
from stoker.models import native

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture
def spec():
    return read(CONFIG, "config.json")


@pytest.fixture
def make_base(tmp_path, spec):
    def make(dtype=torch.float32, name="base"):
        folder = tmp_path / name
        folder.mkdir()
        model = native.build(spec, dtype=dtype, seed=1, initializer_range=0.15)
        tensors = {name: tensor.clone() for name, tensor in native.hf_tensors(model, spec)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**CONFIG, "torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def load_base(spec):
    def load(folder):
        return native.load(folder, spec).eval()

    return load


@pytest.fixture
def make_adapter(tmp_path, load_base):
    def make(base, *, size=0.1, **options):
        model = load_base(base)
        add_lora(model, **{"rank": 2, "alpha": 4, **options})
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
        folder = tmp_path / "adapter"
        adapter.save(model, folder, base_name=str(base))
        return folder

    return make
