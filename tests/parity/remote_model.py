"""A model that brings its own code: the two files that a folder on the Hub would hold, and a folder with them."""

import json

import torch
from borrowed_models import VOCAB
from safetensors.torch import save_file

CONFIGURATION = """
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_its_own"

    def __init__(self, vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **options):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = 64
        super().__init__(**options)
"""

MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tiny import TinyConfig


class Layer(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.hidden = nn.Linear(size, 2 * size)
        self.left = nn.Linear(2 * size, size)  # read past the layer, below

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + nn.functional.linear(self.hidden(x).relu(), self.left.weight, self.left.bias)


class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Embedding(config.max_position_embeddings, size)
        self.layers = nn.ModuleList(Layer(size, config.num_attention_heads) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, labels=None, **options):
        x = self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(x)
        return CausalLMOutputWithPast(logits=logits + logits.sin())
"""


def write(folder):
    """A folder with code, weights and a config.json that points at the code."""
    folder.mkdir(exist_ok=True)
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    size, generator = 32, torch.Generator().manual_seed(0)
    shapes = {"embedding.weight": (VOCAB, size), "positions.weight": (64, size), "lm_head.weight": (VOCAB, size)}
    linears = {"qkv": (3 * size, size), "out": (size, size), "hidden": (2 * size, size), "left": (size, 2 * size)}
    for index in range(2):
        shapes |= {f"layers.{index}.norm.{kind}": (size,) for kind in ("weight", "bias")}
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"layers.{index}.{name}.bias": shape[:1] for name, shape in linears.items()}
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "tiny_of_its_own",
        "architectures": ["TinyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
        "vocab_size": VOCAB,
        "hidden_size": size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
