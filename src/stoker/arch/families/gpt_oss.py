"""gpt-oss: attention with sinks, every second layer with a window, and mixtures with biases and a clamped gate.

A key that is absent has the default that Transformers gives it; a key whose value Stoker does not compute is refused.
The Hub's folders hold experts in MXFP4, which is not read: save them in bf16 first. Checked against transformers 5.24:
`configuration_gpt_oss.py`, `modeling_gpt_oss.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families.common import (
    FULL,
    SLIDING,
    layer_kinds,
    read_attention,
    read_decoder,
    read_head_rope,
    refuse_dropout,
)
from stoker.arch.families.mixtures import read_auxiliary_loss
from stoker.arch.families.names import SEPARATE, ExpertNames, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, ExpertsSpec, LayerSpec, NormSpec, RouterSpec, WeightEntry

_ALPHA = 1.702
_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def _expert_names(kind: str, suffix: str) -> ExpertNames:
    name, is_gate_up = f"mlp.experts.{kind}_proj{suffix}", kind == "gate_up"
    return ExpertNames((name,), f"mlp.experts.{kind}_proj", transposed=not suffix, interleaved=is_gate_up)


_NAMES = Names(
    {
        **SEPARATE,
        "attention.sinks": "self_attn.sinks",
        "feed_forward.router": "mlp.router",
        "feed_forward.experts.gate_up.weight": _expert_names("gate_up", ""),
        "feed_forward.experts.gate_up.bias": _expert_names("gate_up", "_bias"),
        "feed_forward.experts.down.weight": _expert_names("down", ""),
        "feed_forward.experts.down.bias": _expert_names("down", "_bias"),
    }
)


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "gpt_oss" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    reader.require("swiglu_alpha", _ALPHA, fix=f"The experts' gate is native for swiglu_alpha = {_ALPHA}.")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    bias, rope = reader.flag("attention_bias"), read_head_rope(reader)
    experts = ExpertsSpec(
        num_experts=reader.size("num_local_experts", 128),
        top_k=reader.size("num_experts_per_tok", 4),
        intermediate_size=reader.size("intermediate_size"),
        router=RouterSpec(score="softmax_of_chosen", bias=True),
        bias=True,
        gate_limit=reader.positive("swiglu_limit", 7.0),
        auxiliary_loss=read_auxiliary_loss(reader),
    )
    layers = {
        kind: LayerSpec(
            read_attention(reader, rope=rope, qkv_bias=bias, out_bias=bias, window=window, sinks=True), experts, norm
        )
        for kind, window in ((SLIDING, reader.optional_size("sliding_window")), (FULL, None))
    }
    kinds = layer_kinds(reader, [FULL if index % 2 else SLIDING for index in range(reader.size("num_hidden_layers"))])
    return read_decoder(reader, [layers[kind] for kind in kinds], family="gpt_oss", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, _NAMES)
