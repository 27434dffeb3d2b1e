"""Jamba: Mamba-1 layers with an attention layer every so many, dense and expert feed-forwards (arXiv:2403.19887).

Attention has no positions. Checked against transformers 5.24: `configuration_jamba.py`, `modeling_jamba.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import state_space
from stoker.arch.families.common import read_attention, read_decoder, refuse_dropout
from stoker.arch.families.mixtures import read_auxiliary_loss
from stoker.arch.families.names import SEPARATE, ExpertNames, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import (
    ArchSpec,
    ExpertsSpec,
    GatedSpec,
    LayerSpec,
    Mamba1Spec,
    MixerSpec,
    NormSpec,
    RouterSpec,
    WeightEntry,
)

_NAMES = Names(
    layers={
        **SEPARATE,
        "mixer_norm": "input_layernorm",
        **state_space.mamba1_names(),
        "feed_forward_norm": "pre_ff_layernorm",
        "feed_forward.gate_up": ("feed_forward.gate_proj", "feed_forward.up_proj"),
        "feed_forward.down": "feed_forward.down_proj",
        "feed_forward.router": "feed_forward.router",
        "feed_forward.experts.gate_up.weight": ExpertNames(
            ("feed_forward.experts.{}.gate_proj.weight", "feed_forward.experts.{}.up_proj.weight"),
            "feed_forward.experts.gate_up_proj",
        ),
        "feed_forward.experts.down.weight": ExpertNames(
            ("feed_forward.experts.{}.down_proj.weight",), "feed_forward.experts.down_proj"
        ),
    },
    final_norm="model.final_layernorm",
)
_DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_experts": 16,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "jamba" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    reader.require("hidden_act", "silu", fix="Only silu is native.")
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    return read_decoder(reader, _layers(reader, norm), family="jamba", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _layers(reader: ConfigReader, norm: NormSpec) -> tuple[LayerSpec, ...]:
    attention = read_attention(reader, rope=None)
    state_space_mixer = _state_space(reader, norm)
    dense = GatedSpec(reader.size("intermediate_size"))
    experts = _experts(reader, dense.intermediate_size) if reader.size("num_experts") > 1 else dense
    layers = []
    for index in range(reader.size("num_hidden_layers")):
        is_attention = _falls_on(reader, "attn_layer", index, period=8, offset=4)
        has_experts = _falls_on(reader, "expert_layer", index, period=2, offset=1)
        mixer: MixerSpec = attention if is_attention else state_space_mixer
        layers.append(LayerSpec(mixer=mixer, feed_forward=experts if has_experts else dense, norm=norm))
    return tuple(layers)


def _experts(reader: ConfigReader, intermediate_size: int) -> ExpertsSpec:
    return ExpertsSpec(
        num_experts=reader.size("num_experts"),
        top_k=reader.size("num_experts_per_tok", 2),
        intermediate_size=intermediate_size,
        router=RouterSpec(normalized=False),
        auxiliary_loss=read_auxiliary_loss(reader),
    )


def _state_space(reader: ConfigReader, norm: NormSpec) -> Mamba1Spec:
    hidden_size = reader.size("hidden_size")
    return Mamba1Spec(
        inner_size=reader.size("mamba_expand", 2) * hidden_size,
        state_size=reader.size("mamba_d_state", 16),
        conv_kernel=reader.size("mamba_d_conv", 4),
        time_step_rank=state_space.time_step_rank(reader, "mamba_dt_rank", hidden_size),
        conv_bias=reader.flag("mamba_conv_bias", True),
        bias=reader.flag("mamba_proj_bias", False),
        parameter_norm=norm,
    )


def _falls_on(reader: ConfigReader, kind: str, index: int, *, period: int, offset: int) -> bool:
    """Whether layer `index` is one of those that come every `period` layers, from `offset` on."""
    found = reader.get(f"{kind}_offset", offset)
    if not isinstance(found, int) or found < 0:
        raise reader.error(f"{kind}_offset = {found!r} is not a whole number of at least 0.")
    return index % reader.size(f"{kind}_period", period) == found
