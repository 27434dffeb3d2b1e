"""Granite 3 and MiniCPM 1 and 2: Llama's layers with four multipliers, of embeddings, scores, residuals and logits.

MiniCPM's code comes with its checkpoints; its multipliers are written otherwise (arXiv:2404.06395, table 7): the
embeddings times `scale_emb`, what is added to the residual stream times `scale_depth` / sqrt(layers), and the last
hidden states over `hidden_size` / `dim_model_base`. Granite is checked against transformers 5.24:
`configuration_granite.py`, `modeling_granite.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.arch.families.common import (
    LIKE_LLAMA,
    read_attention,
    read_decoder,
    read_gated,
    read_head_rope,
    refuse_dropout,
)
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS: dict[str, dict[str, Any]] = {
    "granite": {**LIKE_LLAMA},
    "minicpm": {**LIKE_LLAMA, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class _Multipliers:
    embedding: float
    residual: float
    logits: float
    scores: float | None


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "granite" or "minicpm" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS[config["model_type"]])
    refuse_dropout(reader, "attention_dropout")
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    multipliers = _multipliers(reader)
    bias = reader.flag("attention_bias")
    layer = LayerSpec(
        mixer=read_attention(
            reader, rope=read_head_rope(reader), qkv_bias=bias, out_bias=bias, scale=multipliers.scores
        ),
        feed_forward=read_gated(reader, bias=reader.flag("mlp_bias")),
        norm=norm,
        residual_scale=multipliers.residual,
    )
    return read_decoder(
        reader,
        layer,
        family="granite",
        final_norm=norm,
        embedding_scale=multipliers.embedding,
        logit_scale=multipliers.logits,
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _multipliers(reader: ConfigReader) -> _Multipliers:
    if reader.config["model_type"] == "granite":
        return _Multipliers(
            embedding=reader.positive("embedding_multiplier", 1.0),
            residual=reader.positive("residual_multiplier", 1.0),
            logits=1.0 / reader.positive("logits_scaling", 1.0),
            scores=reader.positive("attention_multiplier", 1.0),
        )
    reader.require("num_experts", 0, fix="MiniCPM's mixtures of experts are not native.")
    hidden_size = reader.size("hidden_size")
    return _Multipliers(
        embedding=reader.positive("scale_emb", 1.0),
        residual=reader.positive("scale_depth", 1.0) / reader.size("num_hidden_layers") ** 0.5,
        logits=reader.positive("dim_model_base", hidden_size) / hidden_size,
        scores=None,
    )
