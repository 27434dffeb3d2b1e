"""Granite 3 and MiniCPM 1 and 2: Llama's layers with four multipliers, of embeddings, scores, residuals and logits.

MiniCPM's code comes with its checkpoints; its multipliers are written otherwise (arXiv:2404.06395, table 7): the
embeddings times `scale_emb`, what is added to the residual stream times `scale_depth` / sqrt(layers), and the last
hidden states over `hidden_size` / `dim_model_base`. Granite is checked against transformers 5.24:
`configuration_granite.py`, `modeling_granite.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS: dict[str, dict[str, Any]] = {
    "granite": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "minicpm": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class _Multipliers:
    embedding: float
    residual: float
    logits: float
    scores: float | None


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "granite" or "minicpm" configuration; raises ModelError for what it does not compute."""
    model_type = config["model_type"]
    reader = ConfigReader(config, where, _DEFAULTS[model_type])
    refuse_dropout(reader, "attention_dropout")
    hidden_size = reader.size("hidden_size", 4096)
    num_layers = reader.size("num_hidden_layers", 32)
    max_positions = reader.size("max_position_embeddings", 2048)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    multipliers = _multipliers(reader, hidden_size, num_layers)
    bias = reader.flag("attention_bias", False)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=read_rope(reader, head_dim=head_dim, max_positions=max_positions),
            qkv_bias=bias,
            out_bias=bias,
            scale=multipliers.scores,
        ),
        feed_forward=GatedSpec(
            reader.size("intermediate_size", 11008), read_activation(reader, "silu"), reader.flag("mlp_bias", False)
        ),
        norm=norm,
        residual_scale=multipliers.residual,
    )
    return ArchSpec(
        family="granite",
        model_type=model_type,
        vocab_size=reader.size("vocab_size", 32000),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * num_layers,
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
        embedding_scale=multipliers.embedding,
        logit_scale=multipliers.logits,
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names())


def _multipliers(reader: ConfigReader, hidden_size: int, num_layers: int) -> _Multipliers:
    if reader.config["model_type"] == "granite":
        return _Multipliers(
            embedding=reader.positive("embedding_multiplier", 1.0),
            residual=reader.positive("residual_multiplier", 1.0),
            logits=1.0 / reader.positive("logits_scaling", 1.0),
            scores=reader.positive("attention_multiplier", 1.0),
        )
    reader.require("num_experts", 0, fix="MiniCPM's mixtures of experts are not native.")
    return _Multipliers(
        embedding=reader.positive("scale_emb", 1.0),
        residual=reader.positive("scale_depth", 1.0) / num_layers**0.5,
        logits=reader.positive("dim_model_base", hidden_size) / hidden_size,
        scores=None,
    )
