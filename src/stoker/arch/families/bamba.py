"""Bamba: Mamba-2 layers with an attention layer here and there, each followed by a gated feed-forward.

Attention turns half of each head's channels. Checked against transformers 5.24:
`configuration_bamba.py`, `modeling_bamba.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import state_space
from stoker.arch.families.common import FULL, read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

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
_DEFAULTS = {**state_space.BESIDE_ATTENTION, "max_position_embeddings": 262144}
_ROTARY_SHARE = 0.5


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "bamba" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    reader.require("hidden_act", "silu", fix="Only silu is native.")
    reader.require("z_loss_coefficient", 0, fix="Set it to 0.0 in config.json: Stoker trains without a z-loss.")
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    bias = reader.flag("attention_bias")
    rope = read_head_rope(reader, partial=_ROTARY_SHARE)
    mixers = {
        FULL: read_attention(reader, rope=rope, qkv_bias=bias, out_bias=bias),
        state_space.LINEAR: state_space.mamba2(reader, norm=norm),
    }
    feed_forward = GatedSpec(reader.size("intermediate_size"), bias=reader.flag("mlp_bias"))
    layers = [LayerSpec(mixer=mixers[kind], feed_forward=feed_forward, norm=norm) for kind in _kinds(reader)]
    return read_decoder(reader, layers, family="bamba", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _kinds(reader: ConfigReader) -> list[str]:
    indices = reader.get("attn_layer_indices") or []
    if not isinstance(indices, list):
        raise reader.error(f"attn_layer_indices = {indices!r} is not a list of layers.")
    num_layers = reader.size("num_hidden_layers")
    return [FULL if index in indices else state_space.LINEAR for index in range(num_layers)]
