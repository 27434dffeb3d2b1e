"""StableLM (3B, 2, 2-12B): layer norms, a rotation of part of each head, gated by SiLU.

The 12B norms each head of queries and keys with a weight of its own, and runs attention and feed-forward side by side
on one norm. Checked against transformers 5.24: `configuration_stablelm.py`, `modeling_stablelm.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stoker.arch.families.common import read_activation, read_heads, refuse_dropout
from stoker.arch.families.names import SEPARATE, Names, entries
from stoker.arch.families.reader import ConfigReader
from stoker.arch.families.rope import read_rope
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec, LayerSpec, NormSpec, WeightEntry

_HEAD_NORMS = ("q_norm", "k_norm")
_NAMES = Names({**SEPARATE, **{f"attention.{name}": f"self_attn.{name[0]}_layernorm" for name in _HEAD_NORMS}})


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The spec of a "stablelm" configuration; raises ModelError for what it does not compute."""
    reader = ConfigReader(config, where, {"num_key_value_heads": 32, "hidden_size": 2560})
    refuse_dropout(reader, "attention_dropout", "hidden_dropout")
    hidden_size = reader.size("hidden_size")
    max_positions = reader.size("max_position_embeddings", 4096)
    norm = NormSpec("layer", reader.positive("layer_norm_eps", 1e-5), bias=True)
    num_heads, num_kv_heads, head_dim = read_heads(reader, hidden_size)
    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=read_rope(reader, head_dim=head_dim, max_positions=max_positions, partial=0.25),
            qkv_bias=reader.flag("use_qkv_bias", False),
            qk_norm=replace(norm, bias=False) if reader.flag("qk_layernorm", False) else None,
            qk_norm_over="each_head",
        ),
        feed_forward=GatedSpec(reader.size("intermediate_size", 6912), read_activation(reader, "silu")),
        norm=norm,
        placement="parallel_one_norm" if reader.flag("use_parallel_residual", False) else "pre",
    )
    return ArchSpec(
        family="stablelm",
        model_type="stablelm",
        vocab_size=reader.size("vocab_size", 50304),
        hidden_size=hidden_size,
        max_positions=max_positions,
        layers=(layer,) * reader.size("num_hidden_layers", 32),
        final_norm=norm,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


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
