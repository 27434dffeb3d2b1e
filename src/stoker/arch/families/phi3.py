"""Phi-3, Phi-3.5 and Phi-4: Llama's layers, with one stored layer for q, k, v and one for gate and up, and longrope.

Checked against transformers 5.24: `configuration_phi3.py`, `modeling_phi3.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_NAMES = Names({**SEPARATE, "attention.qkv": "self_attn.qkv_proj", "feed_forward.gate_up": "mlp.gate_up_proj"})
_ALIASES = {"su": "longrope", "yarn": "longrope"}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "phi3" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {"original_max_position_embeddings": 4096})
    refuse_dropout(reader, "attention_dropout", "resid_pdrop", "embd_pdrop")
    hidden_size = reader.size("hidden_size", 3072)
    max_positions = reader.size("max_position_embeddings", 4096)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-5))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    rope = read_rope(reader, head_dim=head_dim, max_positions=max_positions, partial=1.0, aliases=_ALIASES)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            window=reader.optional_size("sliding_window"),
        ),
        feed_forward=GatedSpec(reader.size("intermediate_size", 8192), read_activation(reader, "silu")),
        norm=norm,
    )
    return ArchSpec(
        family="phi3",
        model_type="phi3",
        vocab_size=reader.size("vocab_size", 32064),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 32),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
