"""MiniCPM 3: latent attention as DeepSeek's, halves of the turned channels together, and MiniCPM's multipliers.

Checked against transformers 5.24: `configuration_minicpm3.py`, `modeling_minicpm3.py`.
"""

from collections.abc import Mapping
from typing import Any

from stoker.arch.families import latent
from stoker.arch.families.common import read_decoder, read_gated, refuse_dropout
from stoker.arch.families.names import Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, LayerSpec, NormSpec, WeightEntry

_DEFAULTS = {
    "vocab_size": 73448,
    "hidden_size": 2560,
    "intermediate_size": 6400,
    "num_hidden_layers": 62,
    "num_attention_heads": 40,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "mlp_bias": False,
    "attention_bias": False,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "minicpm3" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout")
    hidden_size, num_layers = reader.size("hidden_size"), reader.size("num_hidden_layers")
    if reader.get("v_head_dim") is None:
        head_dim = hidden_size // reader.size("num_attention_heads")
        reader = ConfigReader({**config, "v_head_dim": head_dim}, where, _DEFAULTS)
    norm = NormSpec(epsilon=reader.positive("rms_norm_eps"))
    # Null is for "not scaled", and absence for the published model's scale.
    depth, base = reader.get("scale_depth"), reader.get("dim_model_base")
    layer = LayerSpec(
        mixer=latent.read_attention(reader, interleaved=False),
        feed_forward=read_gated(reader, bias=reader.flag("mlp_bias")),
        norm=norm,
        residual_scale=1.0 if depth is None else reader.positive("scale_depth") / num_layers**0.5,
    )
    return read_decoder(
        reader,
        layer,
        family="minicpm3",
        final_norm=norm,
        embedding_scale=reader.positive("scale_emb"),
        logit_scale=1.0 if base is None else reader.positive("dim_model_base") / hidden_size,
    )


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return entries(spec, Names(latent.names(spec)))
