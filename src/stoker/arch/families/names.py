"""Turns a family's table of module names into its weight map.

A table says once for a layer which Hugging Face modules hold each of our modules; which parameters those have (a bias,
a norm of queries, sinks) is in the spec. So a family is a table, mostly another family's with a few lines changed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from stoker.arch.parts import layer_parameters, norm_parameters
from stoker.arch.spec import ArchSpec, WeightEntry


@dataclass(frozen=True)
class ExpertNames:
    """Whose tensors the linear layers of a layer's experts are, and Transformers' own parameter for them.

    `tensors`: whole names within the layer, with {} for the expert's number ("mlp.experts.{}.gate_proj.weight");
    without it, one tensor holds all experts. `parameter`: the 3-D parameter in memory. The rest as in `WeightEntry`.
    """

    tensors: tuple[str, ...]
    parameter: str
    transposed: bool = False
    interleaved: bool = False

    def entry(self, ours: str, theirs: str, num_experts: int) -> WeightEntry:
        """The entry of our parameter, in the layer that Hugging Face calls `theirs`."""
        stacked = "{}" in self.tensors[0]
        experts = range(num_experts if stacked else 1)
        return WeightEntry(
            ours,
            tuple(f"{theirs}.{tensor.format(expert)}" for expert in experts for tensor in self.tensors),
            transposed=self.transposed,
            stacked=stacked,
            interleaved=self.interleaved,
            parameter=f"{theirs}.{self.parameter}",
        )


Held = str | tuple[str, ...] | ExpertNames

SEPARATE: Mapping[str, Held] = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": "mlp.down_proj",
}
"""Llama's names within a layer, which most families have: separate q, k and v, separate gate and up."""

SANDWICH: Mapping[str, Held] = {
    **SEPARATE,
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
"""The same with norms before and after each part."""


@dataclass(frozen=True)
class Names:
    """Hugging Face's module names of a model; `layers` holds those within a layer, whose own name is `layer`.

    `layers` has an entry for each of our modules in a block ("attention.qkv") or, for a parameter that belongs to none
    of them, its whole name ("attention.sinks"): one module, or several whose rows lie one below the other. Modules in
    `transposed` store [in, out].
    """

    layers: Mapping[str, Held] = field(default_factory=lambda: SEPARATE)
    layer: str = "model.layers.{}"
    embedding: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    transposed: frozenset[str] = frozenset()


def entries(spec: ArchSpec, names: Names) -> tuple[WeightEntry, ...]:
    """The weight map of `spec`; raises KeyError for a parameter whose name `names` lacks."""
    aliases = (f"{names.head}.weight",) if spec.tied_head else ()
    found = [WeightEntry("embedding.weight", (f"{names.embedding}.weight",), aliases=aliases)]
    if spec.learned_positions:
        found.append(WeightEntry("position_embedding.weight", (f"{names.positions}.weight",)))
    for index, layer in enumerate(spec.layers):
        ours = layer_parameters(layer, spec.hidden_size)
        found += _of_layer(ours, f"blocks.{index}", names.layer.format(index), names)
    for parameter in norm_parameters("final_norm", spec.final_norm, ()):
        found.append(WeightEntry(parameter, (f"{names.final_norm}.{_kind(parameter)}",)))
    if not spec.tied_head:
        kinds = ("weight", "bias") if spec.head_bias else ("weight",)
        found += [WeightEntry(f"head.{kind}", (f"{names.head}.{kind}",)) for kind in kinds]
    return tuple(found)


def _of_layer(parameters: Mapping[str, tuple[int, ...]], ours: str, theirs: str, names: Names) -> Iterator[WeightEntry]:
    for parameter, shape in parameters.items():
        module, kind = parameter.rpartition(".")[0], f".{_kind(parameter)}"
        if parameter in names.layers:
            module, kind = parameter, ""
        held = names.layers[module]
        if isinstance(held, ExpertNames):
            yield held.entry(f"{ours}.{parameter}", theirs, shape[0])
            continue
        held = (held,) if isinstance(held, str) else held
        is_transposed = module in names.transposed and kind == ".weight"
        yield WeightEntry(
            f"{ours}.{parameter}", tuple(f"{theirs}.{one}{kind}" for one in held), transposed=is_transposed
        )


def _kind(parameter: str) -> str:
    return parameter.rpartition(".")[2]
