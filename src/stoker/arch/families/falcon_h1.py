"""Falcon-H1: attention and Mamba-2 side by side in every layer, with muP's multipliers (arXiv:2507.22448).

Checked against transformers 5.24: `configuration_falcon_h1.py`, and the PyTorch path of `modeling_falcon_h1.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import state_space
from stoker.arch.families.common import read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, GatedSpec, LayerSpec, NormSpec, SideBySideSpec, WeightEntry

_NAMES = Names(
    layers={
        "mixer_norm": "input_layernorm",
        "mixer.attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mixer.attention.out": "self_attn.o_proj",
        **state_space.mamba2_names("mixer.state_space"),
        "feed_forward_norm": "pre_ff_layernorm",
        "feed_forward.gate_up": ("feed_forward.gate_proj", "feed_forward.up_proj"),
        "feed_forward.down": "feed_forward.down_proj",
    },
    final_norm="model.final_layernorm",
)
_DEFAULTS = {**state_space.BESIDE_ATTENTION, "max_position_embeddings": 8192}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "falcon_h1" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    reader.require("hidden_act", "silu", fix="Only silu is native.")
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    gate_scale, down_scale = _numbers(reader, "mlp_multipliers", 2)
    feed_forward = GatedSpec(
        reader.size("intermediate_size"),
        bias=reader.flag("mlp_bias"),
        gate_scale=gate_scale,
        down_scale=down_scale,
    )
    return read_decoder(
        reader,
        LayerSpec(_mixer(reader, norm), feed_forward, norm),
        family="falcon_h1",
        final_norm=norm,
        embedding_scale=_number(reader, "embedding_multiplier"),
        logit_scale=_number(reader, "lm_head_multiplier"),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _mixer(reader: ConfigReader, norm: NormSpec) -> SideBySideSpec:
    bias = reader.flag("mamba_proj_bias", False)
    if bias != reader.flag("projectors_bias", False):
        raise reader.error("mamba_proj_bias and projectors_bias differ.", fix="Only both or neither are native.")
    attention_bias = reader.flag("attention_bias")
    inner_size = reader.optional_size("mamba_d_ssm") if "mamba_d_ssm" in reader.config else 1024
    return SideBySideSpec(
        attention=read_attention(reader, rope=read_head_rope(reader), qkv_bias=attention_bias, out_bias=attention_bias),
        state_space=state_space.mamba2(
            reader,
            inner_size=inner_size,
            norm=norm if reader.flag("mamba_rms_norm", False) else None,
            gate_before_norm=not reader.flag("mamba_norm_before_gate", True),
            multipliers=_numbers(reader, "ssm_multipliers", 5),
        ),
        attention_in=_number(reader, "attention_in_multiplier"),
        attention_out=_number(reader, "attention_out_multiplier"),
        state_space_in=_number(reader, "ssm_in_multiplier"),
        state_space_out=_number(reader, "ssm_out_multiplier"),
        key_scale=_number(reader, "key_multiplier"),
    )


def _number(reader: ConfigReader, key: str) -> float:
    value = reader.get(key, 1.0)
    return reader.number_above(0.0, key, 1.0 if value is None else value)


def _numbers(reader: ConfigReader, key: str, count: int) -> tuple[float, ...]:
    """`count` multipliers; absent ones are 1."""
    values = reader.get(key)
    if values is None:
        return (1.0,) * count
    if not isinstance(values, list | tuple) or len(values) != count:
        raise reader.error(f"{key} = {values!r} is not a list of {count} numbers.")
    return tuple(reader.number_above(0.0, key, value) for value in values)
