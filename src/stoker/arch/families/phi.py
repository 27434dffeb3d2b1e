"""Phi-1, Phi-1.5 and Phi-2: attention and a plain feed-forward beside each other behind one norm, biases everywhere.

Checked against transformers 5.24: `configuration_phi.py`, `modeling_phi.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, PlainSpec, WeightEntry

_NAMES = Names(
    {
        **SEPARATE,
        "attention.out": "self_attn.dense",
        "attention.q_norm": "self_attn.q_layernorm",
        "attention.k_norm": "self_attn.k_layernorm",
        "feed_forward.up": "mlp.fc1",
        "feed_forward.down": "mlp.fc2",
    },
    final_norm="model.final_layernorm",
)
_DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "qk_layernorm": False,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "phi" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    reader.require("tie_word_embeddings", False, fix="The head has a bias of its own; only an untied one is computed.")
    norm = NormSpec("layer", reader.positive("layer_norm_eps"), bias=True)
    layer = LayerSpec(
        mixer=read_attention(
            reader,
            rope=read_head_rope(reader, partial=0.5),
            qkv_bias=True,
            out_bias=True,
            qk_norm=norm if reader.flag("qk_layernorm") else None,
        ),
        feed_forward=PlainSpec(reader.size("intermediate_size"), read_activation(reader, "gelu_new")),
        norm=norm,
        placement="parallel_one_norm",
    )
    left_out = reader.left_out("resid_pdrop", "embd_pdrop")
    return read_decoder(reader, layer, family="phi", final_norm=norm, head_bias=True, left_out=left_out)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
