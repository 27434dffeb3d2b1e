"""Granite 4 hybrids: Mamba-2 layers with attention layers among them, Granite's multipliers, dense or with experts.

What its code calls the shared feed-forward is the only one of a model without experts. Checked against transformers
5.24: `configuration_granitemoehybrid.py`, `modeling_granitemoehybrid.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import state_space
from stoker.arch.families.common import FULL, LIKE_LLAMA, read_attention, read_decoder, read_head_rope, refuse_dropout
from stoker.arch.families.mixtures import read_auxiliary_loss
from stoker.arch.families.names import SEPARATE, ExpertNames, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import (
    ArchSpec,
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    GatedSpec,
    LayerSpec,
    NormSpec,
    RouterSpec,
    WeightEntry,
)

_NAMES = Names(
    layers={
        **SEPARATE,
        "mixer_norm": "input_layernorm",
        **state_space.mamba2_names(),
        "feed_forward.gate_up": "shared_mlp.input_linear",
        "feed_forward.down": "shared_mlp.output_linear",
        "feed_forward.shared.gate_up": "shared_mlp.input_linear",
        "feed_forward.shared.down": "shared_mlp.output_linear",
        "feed_forward.router": "block_sparse_moe.router.layer",
        "feed_forward.experts.gate_up.weight": ExpertNames(
            ("block_sparse_moe.input_linear.weight",), "block_sparse_moe.experts.gate_up_proj"
        ),
        "feed_forward.experts.down.weight": ExpertNames(
            ("block_sparse_moe.output_linear.weight",), "block_sparse_moe.experts.down_proj"
        ),
    }
)
_DEFAULTS = {**LIKE_LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "granitemoehybrid" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    reader.require("hidden_act", "silu", fix="Only silu is native.")
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    mixers = {FULL: _attention(reader), state_space.LINEAR: state_space.mamba2(reader, norm=norm)}
    feed_forward = _feed_forward(reader)
    residual_scale = reader.positive("residual_multiplier", 1.0)
    return read_decoder(
        reader,
        [LayerSpec(mixers[kind], feed_forward, norm, residual_scale=residual_scale) for kind in _kinds(reader)],
        family="granite_hybrid",
        final_norm=norm,
        embedding_scale=reader.positive("embedding_multiplier", 1.0),
        logit_scale=1 / reader.positive("logits_scaling", 1.0),
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)


def _feed_forward(reader: ConfigReader) -> FeedForwardSpec:
    shared_size = reader.size("shared_intermediate_size")
    if not reader.get("num_local_experts"):
        return GatedSpec(intermediate_size=shared_size)
    return ExpertsSpec(
        num_experts=reader.size("num_local_experts"),
        top_k=reader.size("num_experts_per_tok"),
        intermediate_size=reader.size("intermediate_size"),
        router=RouterSpec(score="softmax_of_chosen"),
        shared_size=shared_size,
        auxiliary_loss=read_auxiliary_loss(reader),
    )


def _kinds(reader: ConfigReader) -> list[str]:
    num_layers = reader.size("num_hidden_layers")
    values = reader.get("layer_types", reader.get("layers_block_type")) or [state_space.LINEAR] * num_layers
    kinds = state_space.layer_types(reader, values)
    if len(kinds) != num_layers:
        raise reader.error(f"layer_types has {len(kinds)} entries, but num_hidden_layers = {num_layers}.")
    return kinds


def _attention(reader: ConfigReader) -> AttentionSpec:
    bias = reader.flag("attention_bias")
    return read_attention(
        reader,
        rope=read_head_rope(reader) if reader.get("position_embedding_type") == "rope" else None,
        qkv_bias=bias,
        out_bias=bias,
        scale=reader.positive("attention_multiplier", 1.0),
    )
