"""Phi-3, Phi-3.5 and Phi-4: Llama's layers, with one stored layer for q, k, v and one for gate and up, and longrope.

Checked against transformers 5.24: `configuration_phi3.py`, `modeling_phi3.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_NAMES = Names({**SEPARATE, "attention.qkv": "self_attn.qkv_proj", "feed_forward.gate_up": "mlp.gate_up_proj"})
_ALIASES = {"su": "longrope", "yarn": "longrope"}
_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "phi3" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout", "resid_pdrop", "embd_pdrop")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    rope = read_head_rope(reader, partial=1.0, aliases=_ALIASES)
    attention = read_attention(reader, rope=rope, window=reader.optional_size("sliding_window"))
    return read_decoder(reader, LayerSpec(attention, read_gated(reader), norm), family="phi3", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
