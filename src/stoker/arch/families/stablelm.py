"""StableLM (3B, 2, 2-12B): layer norms, a rotation of part of each head, gated by SiLU.

The 12B norms each head of queries and keys with a weight of its own, and runs attention and feed-forward side by side
on one norm. Checked against transformers 5.24: `configuration_stablelm.py`, `modeling_stablelm.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stoker.arch.families.common import read_attention, read_decoder, read_gated, read_head_rope, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import ArchSpec, AttentionSpec, LayerSpec, NormSpec, WeightEntry

_HEAD_NORMS = ("q_norm", "k_norm")
_NAMES = Names({**SEPARATE, **{f"attention.{name}": f"self_attn.{name[0]}_layernorm" for name in _HEAD_NORMS}})
_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "stablelm" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, _DEFAULTS)
    refuse_dropout(reader, "attention_dropout", "hidden_dropout")
    norm = NormSpec("layer", reader.positive("layer_norm_eps"), bias=True)
    layer = LayerSpec(
        mixer=read_attention(
            reader,
            rope=read_head_rope(reader, partial=0.25),
            qkv_bias=reader.flag("use_qkv_bias"),
            qk_norm=replace(norm, bias=False) if reader.flag("qk_layernorm") else None,
            qk_norm_over="each_head",
        ),
        feed_forward=read_gated(reader),
        norm=norm,
        placement="parallel_one_norm" if reader.flag("use_parallel_residual") else "pre",
    )
    return read_decoder(reader, layer, family="stablelm", final_norm=norm)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
    return tuple(_by_head(entry, spec) for entry in entries(spec, _NAMES))


def _by_head(entry: WeightEntry, spec: ArchSpec) -> WeightEntry:
    """The norms of heads are stored one by one."""
    name = entry.ours.split(".")[-2]
    mixer = spec.layers[0].mixer
    if name not in _HEAD_NORMS or not isinstance(mixer, AttentionSpec):
        return entry
    heads = mixer.num_heads if name == "q_norm" else mixer.num_kv_heads
    stored = entry.theirs[0].removesuffix(".weight")
    return replace(entry, theirs=tuple(f"{stored}.norms.{head}.weight" for head in range(heads)), stacked=True)
