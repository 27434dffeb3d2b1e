"""What an architecture costs: parameters and floating-point operations. Exact counts, no torch.

FLOPs count a multiply-add as two and leave out norms, activations and softmax, as is usual (Kaplan et al.,
arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B). Saved bytes are in `saved` and `activations`.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator

from stoker.arch.borrowed import AnySpec, BorrowedSpec
from stoker.arch.families import weight_map
from stoker.arch.parts import layer_parameters, linears_of, norm_parameters, parts
from stoker.arch.spec import ArchSpec, ExpertsSpec, LayerSpec, RopeSpec, WeightEntry


def parameters_by_part(spec: ArchSpec) -> dict[str, int]:
    """Number of parameters of embedding, mixers (attention and its like), feed_forward, norms and head.

    The head counts 0 when it is tied to the embedding; an embedding of positions counts with that of tokens.
    """
    counts = {
        "embedding": (spec.vocab_size + spec.learned_positions) * spec.hidden_size,
        "attention": 0,
        "feed_forward": 0,
        "norms": _size_of(norm_parameters("final_norm", spec.final_norm, (spec.hidden_size,))),
        "head": 0 if spec.tied_head else spec.vocab_size * (spec.hidden_size + spec.head_bias),
    }
    for layer in spec.layers:
        for name, shape in layer_parameters(layer, spec.hidden_size).items():
            group = "feed_forward" if name.startswith("feed_forward.") else "attention"
            counts["norms" if "norm." in name else group] += math.prod(shape)
    return counts


def num_parameters(spec: AnySpec) -> int:
    """Number of parameters of the whole model, a tied head counted once."""
    if isinstance(spec, BorrowedSpec):
        return spec.num_parameters
    return sum(parameters_by_part(spec).values())


linears = linears_of


def linear_shapes(spec: AnySpec) -> dict[str, tuple[int, int]]:
    """(in, out) features of every linear layer of the blocks, by its Hugging Face module name, in file order."""
    if isinstance(spec, BorrowedSpec):
        return spec.linear_shapes()
    shapes = {}
    names = {entry.ours: adapted_names(entry) for entry in weight_map(spec)}
    for index, layer in enumerate(spec.layers):
        for linear, sizes in linears(layer, spec.hidden_size).items():
            modules = names[f"blocks.{index}.{linear}.weight"]
            # One Hugging Face layer may hold all parts, as Phi-3's qkv_proj does.
            out_features = sizes.out_features if len(modules) > 1 else (sum(sizes.out_features),)
            named = zip(modules, out_features, strict=True)
            shapes |= {name: (sizes.in_features, size) for name, size in named}
    return shapes


def linears_by_name_only(spec: AnySpec) -> frozenset[str]:
    """Hugging Face names of the linear layers that have an adapter only where its targets name them."""
    if isinstance(spec, BorrowedSpec):
        return frozenset()
    names = {entry.ours: adapted_names(entry) for entry in weight_map(spec)}
    return frozenset(
        name
        for index, layer in enumerate(spec.layers)
        for linear, sizes in linears(layer, spec.hidden_size).items()
        if sizes.by_name_only
        for name in names[f"blocks.{index}.{linear}.weight"]
    )


def lora_parameters(spec: AnySpec, rank: int, names: Collection[str] | None = None) -> int:
    """Number of parameters of adapters of `rank`: A [rank, in] and B [out, rank] for each linear layer.

    `names`: full Hugging Face module names or their endings, such as "q_proj"; None: every linear layer of the blocks.
    """
    experts = expert_counts(spec)
    return sum(
        rank * (in_features + out_features) * experts.get(module, 1)
        for module, (in_features, out_features) in linear_shapes(spec).items()
        if names is None or any(f".{module}".endswith(f".{name}") for name in names)
    )


def adapted_linears(spec: AnySpec, rank: int, names: Collection[str]) -> tuple[tuple[str, int], ...]:
    """(our name in a block, values a token of its input times A) of the linear layers that adapters of `rank` are on.

    `names`: full Hugging Face module names. Layers of a block that have the same name are taken together: where some
    of them have an adapter only, what all keep is averaged.
    """
    chosen, values, there = frozenset(names), Counter[str](), Counter[str]()
    for linear, used, modules in _named(spec):
        there[linear] += 1
        values[linear] += round(rank * used * sum(module in chosen for module in modules))
    return tuple((linear, max(1, count // there[linear])) for linear, count in values.items() if count)


def adapter_parameters_by_linear(spec: AnySpec, rank: int, names: Collection[str]) -> tuple[tuple[str, int], ...]:
    """(our name in a block, values of the adapters of `rank` on it) of the linear layers that have some.

    `names`, and what is averaged: as in `adapted_linears`.
    """
    chosen, shapes, experts = frozenset(names), linear_shapes(spec), expert_counts(spec)
    values, there = Counter[str](), Counter[str]()
    for linear, _, modules in _named(spec):
        there[linear] += 1
        values[linear] += sum(rank * sum(shapes[name]) * experts.get(name, 1) for name in modules if name in chosen)
    return tuple((linear, count // there[linear]) for linear, count in values.items() if count)


def _named(spec: AnySpec) -> Iterator[tuple[str, float, list[str]]]:
    """Each linear layer of each block: our name there, how many times a token passes it, Hugging Face's names."""
    if isinstance(spec, BorrowedSpec):
        for index, layer in enumerate(spec.layers):
            for linear, sizes in linears(layer, spec.hidden_size).items():
                name = linear.removeprefix(f"{layer.mixer_name}.")
                yield linear, sizes.used, [f"{spec.layers_name}.{index}.{name}"]
        return
    modules = {entry.ours: adapted_names(entry) for entry in weight_map(spec)}
    for index, layer in enumerate(spec.layers):
        for linear, sizes in linears(layer, spec.hidden_size).items():
            yield linear, sizes.used, modules[f"blocks.{index}.{linear}.weight"]


def adapted_names(entry: WeightEntry) -> list[str]:
    """The Hugging Face names by which adapters know the linear layers that a parameter holds."""
    return [name.removesuffix(".weight") for name in ((entry.parameter,) if entry.parameter else entry.theirs)]


def expert_counts(spec: AnySpec) -> dict[str, int]:
    """How many experts each 3-D parameter holds, by its name among `linear_shapes`, whose shape is that of one."""
    if isinstance(spec, BorrowedSpec):
        return {}
    three_d = (entry for entry in weight_map(spec) if entry.parameter is not None)
    return {adapted_names(entry)[0]: _num_experts(spec, entry) for entry in three_d}


def _num_experts(spec: ArchSpec, entry: WeightEntry) -> int:
    feed_forward = spec.layers[int(entry.ours.split(".")[1])].feed_forward
    return feed_forward.num_experts if isinstance(feed_forward, ExpertsSpec) else 1


def flops_per_token(spec: AnySpec, sequence_length: int) -> float:
    """FLOPs of a forward per token of a document of `sequence_length` tokens, averaged over its positions.

    Two for each weight of a matmul, the head's included, and what mixers compute besides: in attention four for each
    channel of each query head and key seen.
    """
    layers = sum(sum(layer_flops_per_token(layer, spec.hidden_size, sequence_length).values()) for layer in spec.layers)
    return 2 * spec.vocab_size * spec.hidden_size + layers


def training_flops_per_token(spec: AnySpec, sequence_length: int, *, frozen_base: bool) -> float:
    """FLOPs of forward and backward per token, without those of adapters and of what is computed again.

    A backward costs twice its forward: once for the gradient of what comes in, once for that of the weights. A frozen
    base has only the first for its matmuls; what mixers compute without weights has both.
    """
    forward = flops_per_token(spec, sequence_length)
    weightless = sum(
        part.flops(sequence_length) for layer in spec.layers for part in parts(layer, spec.hidden_size).values()
    )
    return forward + (forward + weightless if frozen_base else 2 * forward)


def adapter_flops_per_token(spec: AnySpec, rank: int, names: Collection[str]) -> float:
    """FLOPs of adapters of `rank` in forward and backward per token: six for each of their values that a token meets.

    `names`: full Hugging Face module names.
    """
    chosen, shapes, total = frozenset(names), linear_shapes(spec), 0.0
    for _, used, modules in _named(spec):
        total += sum(6.0 * rank * used * sum(shapes[name]) for name in modules if name in chosen)
    return total


def layer_flops_per_token(layer: LayerSpec, hidden_size: int, sequence_length: int) -> dict[str, float]:
    """FLOPs of a layer's forward a token: of its linear layers ("attention.qkv"), and of the rest of each part."""
    flops = {name: 2.0 * sizes.used * sizes.weights for name, sizes in linears(layer, hidden_size).items()}
    return flops | {name: part.flops(sequence_length) for name, part in parts(layer, hidden_size).items()}


def ropes(spec: ArchSpec) -> set[RopeSpec]:
    """The distinct rotary embeddings of a model, wherever in a layer they are."""
    found = set()
    for mixer in {layer.mixer for layer in spec.layers}:
        for holder in (mixer, getattr(mixer, "attention", None)):
            rope = getattr(holder, "rope", None)
            if rope is not None:
                found.add(rope)
    return found


def _size_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
