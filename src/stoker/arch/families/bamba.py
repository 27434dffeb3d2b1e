"""Bamba: Mamba-2 layers with an attention layer here and there, each followed by a gated feed-forward.

Attention turns half of each head's channels. Checked against transformers 5.24:
`configuration_bamba.py`, `modeling_bamba.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import state_space
from stoker.arch.families.common import read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, GatedSpec, LayerSpec, NormSpec, RopeSpec, WeightEntry

_NAMES = Names(
    layers={
        **SEPARATE,
        "mixer_norm": "input_layernorm",
        **state_space.mamba2_names(),
        "feed_forward_norm": "pre_ff_layernorm",
        "feed_forward.gate_up": ("feed_forward.gate_proj", "feed_forward.up_proj"),
        "feed_forward.down": "feed_forward.down_proj",
    },
    final_norm="model.final_layernorm",
)
_DEFAULTS = {"num_key_value_heads": 8}
_ROTARY_SHARE = 0.5


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "bamba" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    reader.require("hidden_act", "silu", fix="Only silu is native.")
    reader.require("z_loss_coefficient", 0, fix="Set it to 0.0 in config.json: Stoker trains without a z-loss.")
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 4096)
    max_positions = reader.size("max_position_embeddings", 262144)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps", 1e-5))
    mixers = {
        "full_attention": state_space.attention(
            reader,
            hidden_size,
            rope=_rope(reader, hidden_size, max_positions),
            bias=reader.flag("attention_bias", False),
        ),
        "linear_attention": state_space.mamba2(reader, hidden_size, norm=norm),
    }
    feed_forward = GatedSpec(
        intermediate_size=reader.size("intermediate_size", 14336), bias=reader.flag("mlp_bias", False)
    )
    return ArchSpec(
        family="bamba",
        model_type=config["model_type"],
        vocab_size=reader.size("vocab_size", 128000),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=tuple(LayerSpec(mixer=mixers[kind], feed_forward=feed_forward, norm=norm) for kind in _kinds(reader)),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _rope(reader: ConfigReader, hidden_size: int, max_positions: int) -> RopeSpec:
    _, _, head_dim = read_heads(reader, hidden_size)
    return read_rope(reader, head_dim=head_dim, max_positions=max_positions, partial=_ROTARY_SHARE)


def _kinds(reader: ConfigReader) -> list[str]:
    indices = reader.get("attn_layer_indices") or []
    if not isinstance(indices, list):
        raise reader.error(f"attn_layer_indices = {indices!r} is not a list of layers.")
    num_layers = reader.size("num_hidden_layers", 32)
    return ["full_attention" if index in indices else "linear_attention" for index in range(num_layers)]
